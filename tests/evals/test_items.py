import dataclasses

import numpy as np
import pytest

from lcx.evals import items
from lcx.evals.answers import AnswerLog
from lcx.evals.tasks.table import WORDS
from tests.evals.text_cases import task


class Parrot:
    """Answers every question with nothing."""

    scheme, fingerprint = "none", "parrot"

    def complete(self, items, new_tokens):
        yield {i: "" for i in range(len(items))}


def same(one, other) -> bool:
    fields = [field.name for field in dataclasses.fields(one)]
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in fields)


@pytest.mark.parametrize("name", ["passkey", "session_state", "ruler_qa_1", "babilong_qa2", "needle_in_prose", "mrcr_2"])
def test_items_come_back_from_their_file_as_they_were(name, tmp_path, monkeypatch):
    monkeypatch.setattr(items, "WORTH", -1.0)
    made = task(name, tmp_path)
    composed, folder = made.items(2048, 2), tmp_path / "items"
    assert items.kept(folder, (name,), lambda: composed) is composed
    (file,) = folder.iterdir()
    found = items.kept(folder, (name,), lambda: pytest.fail("composed twice"))
    assert len(found) == len(composed) and all(map(same, found, composed))
    # A damaged file is composed anew, and then right again.
    file.write_bytes(file.read_bytes()[:100])
    assert items.kept(folder, (name,), lambda: composed) is composed
    assert all(map(same, items.kept(folder, (name,), list), composed))


def test_only_what_took_long_is_kept(tmp_path):
    made = task("passkey", tmp_path)
    items.kept(tmp_path / "items", ("passkey",), lambda: made.items(512, 1))
    assert not (tmp_path / "items").exists()
    assert len(items.kept(None, ("passkey",), lambda: made.items(512, 1))) == 5


def test_one_evaluation_composes_once_for_all_schemes_and_the_next_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(items, "WORTH", -1.0)
    composed = []

    def counted(made):
        own = type(made).items
        monkeypatch.setattr(type(made), "items", lambda self, *args: composed.append(1) or own(self, *args))
        return made

    log = AnswerLog(tmp_path / "eval" / "answers.jsonl")
    first = counted(task("passkey", tmp_path))
    rows = [first.measure(Parrot(), 512, 2, log) for _ in range(3)]
    assert rows[0] == rows[1] == rows[2] and len(composed) == 1
    assert task("passkey", tmp_path).measure(Parrot(), 512, 2, AnswerLog(tmp_path / "eval" / "answers.jsonl")) == rows[0]
    assert len(composed) == 1


def test_names_of_files_change_with_all_that_questions_depend_on(tmp_path):
    names = {}
    for name in WORDS:
        names[repr(task(name, tmp_path)._named())] = name
    assert len(names) == len(WORDS)
    made = task("needle_in_prose", tmp_path)
    others = [
        dataclasses.replace(made, seed=1),
        dataclasses.replace(made, grid=(0.0, 1.0)),
        dataclasses.replace(made, prose=made.prose.without(("the",))),
        task("needle_in_prose", tmp_path, faithful=True),
        task("needle_in_prose", tmp_path, tokenizer="bytes+bos"),
    ]
    assert len({repr(one._named()) for one in (made, *others)}) == 6
    assert made._named() == task("needle_in_prose", tmp_path)._named()


def test_answers_are_heard_as_they_come(tmp_path):
    log, heard = AnswerLog(tmp_path / "answers.jsonl"), []
    log.heard = heard.append
    for key in "abc":
        log.add(key, output="x")
    assert heard == [1, 2, 3] and log.added == 3 and AnswerLog(tmp_path / "answers.jsonl").added == 0
