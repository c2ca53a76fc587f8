"""Results between the marks of a README."""

import pytest

from lcx.report import markdown


def test_fill_replaces_what_stands_between_the_marks_and_nothing_else(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- a -->\nold\nlines\n<!-- /a -->\nbetween\n<!-- b -->\n<!-- /b -->\nafter\n")
    markdown.fill(page, "a", markdown.table(["x", "y"], [[1, "two"]]))
    markdown.fill(page, "b", r"a \1 backslash")
    between = "before\n<!-- a -->\n| x | y |\n| --- | --- |\n| 1 | two |\n<!-- /a -->\nbetween\n"
    assert page.read_text() == between + "<!-- b -->\na \\1 backslash\n<!-- /b -->\nafter\n"


def test_missing_marks_are_an_error(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("<!-- a -->\nnever closed\n")
    with pytest.raises(ValueError, match="marks of 'a' 0 times"):
        markdown.fill(page, "a", "text")
    assert page.read_text() == "<!-- a -->\nnever closed\n"
