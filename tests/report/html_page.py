"""A page of a report, read back: its sections with their text and tables, and whether its tags are in order."""

from __future__ import annotations

import dataclasses
import html.parser

VOID = {"meta", "img", "br"}


@dataclasses.dataclass
class Section:
    """The text of a section, the rows of its tables, and what has a class, by class."""

    text: str = ""
    tables: list[list[list[str]]] = dataclasses.field(default_factory=list)
    summaries: list[str] = dataclasses.field(default_factory=list)
    images: list[str] = dataclasses.field(default_factory=list)
    spans: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    """(class, title, text) of each innermost span."""


class Page(html.parser.HTMLParser):
    """Sections by title; the text before the first is that of "". Asserts that every tag is closed in its place."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.sections, self._stack, self._title = {"": Section()}, [], None
        self._section = self.sections[""]
        self.feed(content)
        self.close()
        assert not self._stack, self._stack

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert not any(name.startswith("on") or name == "href" for name in attributes), attributes
        assert tag not in ("script", "link", "iframe"), tag
        if tag == "img":
            assert attributes["src"].startswith("data:image/png;base64,")
            self._section.images.append(attributes["alt"])
        if tag in VOID:
            return
        self._stack.append(tag)
        if tag == "h2":
            self._title = ""
        elif tag == "table":
            self._section.tables.append([])
        elif tag == "tr":
            self._section.tables[-1].append([])
        elif tag in ("td", "th"):
            self._section.tables[-1][-1].append("")
        elif tag == "summary":
            self._section.summaries.append("")
        elif tag == "span":
            self._section.spans.append((attributes.get("class", ""), attributes.get("title", ""), ""))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        closing = self._stack.pop()
        # A paragraph or cell may be left open in HTML, but not on these pages.
        assert closing == tag, (closing, tag)
        if tag == "h2":
            self._section = self.sections[self._title] = Section()
        elif tag == "section":
            self._section = Section()

    def handle_data(self, data):
        if "style" in self._stack:
            return
        if "h2" in self._stack:
            self._title += data
            return
        section = self._section
        section.text += data
        if {"td", "th"} & set(self._stack):
            section.tables[-1][-1][-1] += data
        if "summary" in self._stack:
            section.summaries[-1] += data
        if "span" in self._stack:
            kind, title, text = section.spans[-1]
            section.spans[-1] = kind, title, text + data
