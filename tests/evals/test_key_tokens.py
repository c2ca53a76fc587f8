"""LongPPL and losses by kind, against models whose losses are known."""

import dataclasses
import math

import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.data.config import DataConfig, PartConfig
from lcx.data.sources.sources import InMemorySource, Subset
from lcx.data.tokenizers.tokenizers import Bytes
from lcx.evals.answers import AnswerLog
from lcx.evals.base import Evaluator, Materials, Scores
from lcx.evals.comparison import compare
from lcx.evals.config import EvalConfig
from lcx.evals.results import EvalResult
from lcx.evals.tasks import key_tokens
from lcx.evals.tasks.key_tokens import KeyTokens, carried, is_key, passage
from lcx.evals.tasks.loss_by_kind import LossByKind, LossBySource
from lcx.evals.tasks.perplexity import Perplexity

LONGEST, SHORT = 256, 32


class Copier:
    """A model that predicts a byte well, at 0.1 nats, if the sixteen before it stand further up in its context; else at 3."""

    fingerprint, scheme = "copier", "none"

    def __init__(self, length=LONGEST):
        self.length, self.asked = length, 0

    def loglikelihood(self, items):
        found = []
        for item in items:
            self.asked += 1
            row, first = np.concatenate([item.prompt, item.answer]), len(item.prompt)
            assert len(row) <= self.length + 1
            text = bytes(row.astype(np.uint8))
            nll = [0.1 if text.find(text[max(0, i - 16) : i + 1], 0, i) >= 0 else 3.0 for i in range(first, len(row))]
            found.append(Scores(np.asarray(nll, np.float32), np.zeros(len(nll), bool)))
        return found


class Forgetful(Copier):
    """A judge that finds as many key tokens, the last of them one place further down."""

    def loglikelihood(self, items):
        found = super().loglikelihood(items)
        if self.length == LONGEST:
            second_end = second()[1] - 1
            nll = found[0].nll
            nll[second_end], nll[second_end - 1] = 0.1, 3.0
        return found


PASSAGE = "Anna K met 17 owls by the red barn; "
TEXT = (PASSAGE + "".join(chr(97 + (i * i * 7 + i // 26 * 11) % 26) for i in range(139)) + " " + PASSAGE + "z" * 60)[: LONGEST + 1]


def materials(**config) -> Materials:
    rows = [Bytes().encode(TEXT)]
    source = InMemorySource(["d"], rows, [0], 256)
    settings = EvalConfig(lengths=(64, LONGEST), perplexity_tokens=LONGEST, short_context=SHORT, **config)
    data = DataConfig(parts={"books": PartConfig(weight=1.0), "web": PartConfig(weight=1.0)})
    made = Materials(settings, data, Bytes(), lambda _: Subset(source, np.arange(1)))
    return dataclasses.replace(made, evaluator=Evaluator(Copier, Bytes()))


def second() -> tuple[int, int]:
    """Characters of the passage's second occurrence."""
    at = TEXT.index(PASSAGE, 1)
    return at, at + len(PASSAGE)


def test_key_tokens_are_those_that_far_context_gives_away(tmp_path):
    log, task = AnswerLog(tmp_path / "answers.jsonl"), KeyTokens.build(materials())
    rows = {row.metric: row for row in task.measure(Copier(), LONGEST, 1, log)}
    mask = task._mask(task.spans.text[0], log)
    first, end = second()
    # From the seventeenth byte of the copy on: predictions are one behind the text.
    wanted = np.zeros(LONGEST, bool)
    wanted[first + 16 - 1 : end - 1] = True
    # The z's repeat themselves within a short context.
    assert np.array_equal(mask, wanted)
    assert rows["nll"].value == pytest.approx(0.1, rel=1e-6) and rows["nll"].n == wanted.sum()
    assert rows["key_share"].value == pytest.approx(wanted.mean())
    whole = Copier().loglikelihood([type("Item", (), {"prompt": task.spans.text[0][:1], "answer": task.spans.text[0][1:]})])[0].nll
    assert rows["other_nll"].value == pytest.approx(whole[~wanted].mean(), rel=1e-6)
    # Windows of 64 tokens do not reach the first occurrence.
    short = {row.metric: row for row in task.measure(Copier(64), 64, 1, log)}
    assert (
        short["nll"].value == pytest.approx(3.0) and short["nll"].n == rows["nll"].n and short["nll"].digest == rows["nll"].digest
    )


def test_the_evaluator_is_asked_once(tmp_path):
    path, asked = tmp_path / "answers.jsonl", []

    def backend(length):
        asked.append(length)
        return Copier(length)

    made = dataclasses.replace(materials(), evaluator=Evaluator(backend, Bytes(), "judge"))
    task = KeyTokens.build(made)
    one = task.measure(Copier(), LONGEST, 1, AnswerLog(path))
    assert set(asked) == {LONGEST, SHORT + SHORT // 4}
    assert "as judged by judge" in task.notes[0]
    asked.clear()
    assert KeyTokens.build(made).measure(Copier(), LONGEST, 1, AnswerLog(path)) == one
    assert set(asked) == {LONGEST}  # for its fingerprint alone
    kept = AnswerLog(path)._known.popitem()[1]
    assert "".join(kept["passage"]["texts"]) in TEXT and kept["evaluator"] == "judge"


def test_limits_of_key_tokens():
    nan = math.nan
    before = np.array([nan, nan, 5.0, 5.0, 2.0, 4.0, 3.0])
    after = np.array([0.1, 0.1, 1.0, 3.0, 0.1, 1.9, 1.0])
    # Gains of 4; 2 but more than 2 left; 1.9; 2.1; exactly 2, which is not more than 2.
    assert is_key(before, after, 2).tolist() == [False, False, True, False, False, True, False]


def test_key_tokens_go_from_one_tokenizer_to_another():
    theirs, ours = ["the ", "old", " owl", " barn"], ["t", "he", " ol", "d", " o", "wl ", "barn"]
    assert carried(np.array([False, True, True, False]), theirs, ours).tolist() == [False, False, False, True, True, False, False]
    assert carried(np.zeros(4, bool), theirs, ours).tolist() == [False] * 7
    assert carried(np.ones(4, bool), theirs, ours).tolist() == [True] * 7
    # A token of ours that lies over two marked ones of theirs, and one without text.
    found = carried(np.array([False, True, True, False]), ["a", "b", "c", "d"], ["a", "bc", "", "d"])
    assert found.tolist() == [False, True, False, False]
    # Their first token holds two characters, ours one.
    assert carried(np.array([True]), ["cd"], ["b", "c", "d"], shift=1).tolist() == [False, True, True]


class Halves:
    """A tokenizer of two bytes each, to have another one."""

    fingerprint, eos_id = "halves", None

    def encode(self, text):
        raw = text.encode()
        return np.array([raw[i] + 256 * (raw[i + 1] if i + 1 < len(raw) else 0) for i in range(0, len(raw), 2)], np.int32)

    def decode(self, tokens):
        return bytes(b for t in tokens for b in (t % 256, t // 256) if b).decode(errors="replace")


class Wide(Copier):
    """The same model over two bytes a token."""

    def loglikelihood(self, items):
        found = []
        for item in items:
            row, first = np.concatenate([item.prompt, item.answer]), len(item.prompt)
            nll = [0.1 if _has(row[:i], row[max(0, i - 8) : i + 1]) else 3.0 for i in range(first, len(row))]
            found.append(Scores(np.asarray(nll, np.float32), np.zeros(len(nll), bool)))
        return found


def _has(row, part) -> bool:
    return any(np.array_equal(row[i : i + len(part)], part) for i in range(len(row) - len(part) + 1))


def test_an_evaluator_may_have_another_tokenizer(tmp_path):
    made = dataclasses.replace(materials(), evaluator=Evaluator(Wide, Halves(), "wide"))
    task = KeyTokens.build(made)
    mask = task._mask(task.spans.text[0], AnswerLog(None))
    first, end = second()
    assert mask.any() and not mask[: first + 15].any() and not mask[end:].any()
    marked = "".join(TEXT[1:][i] for i in np.flatnonzero(mask))
    assert marked in PASSAGE and len(marked) >= 8


def test_a_passage_is_where_key_tokens_are():
    found = np.zeros(1000, bool)
    found[[700, 710, 790]] = True
    gains = np.where(found, 3.0, -1.0)
    gains[:10] = np.nan
    kept = passage([str(i) for i in range(1000)], gains, found)
    assert len(kept["texts"]) == key_tokens.SHOWN and {"700", "710", "790"} <= set(kept["texts"])
    assert [kept["texts"][i] for i in kept["keys"]] == ["700", "710", "790"]
    assert max(kept["weights"]) == 5.0 and min(kept["weights"]) == pytest.approx(math.exp(-1), abs=0.01)


def test_a_short_context_must_be_short():
    made = materials()
    settings = dataclasses.replace(made.config, short_context=LONGEST)
    with pytest.raises(UserError, match="evals.short_context=256 must be below 256"):
        KeyTokens.build(dataclasses.replace(made, config=settings))
    assert key_tokens.short_context(EvalConfig(lengths=(256, 131072))) == 4096
    assert key_tokens.short_context(EvalConfig(lengths=(256, 4096))) == 512


def test_losses_of_kinds_add_up_to_the_whole():
    made = materials()
    backend = Copier()
    (nll, *_) = Perplexity.build(made).measure(backend, LONGEST, 1, AnswerLog(None))
    rows = {row.task: row for row in LossByKind.build(made).measure(backend, LONGEST, 1, AnswerLog(None))}
    for names in (("word", "name", "number", "code", "symbol", "space"), ("new", "copied_near", "copied_far")):
        found = [rows[f"loss_by_kind_{name}"] for name in names if f"loss_by_kind_{name}" in rows]
        assert sum(row.n for row in found) == nll.n
        assert sum(row.value * row.n for row in found) / nll.n == pytest.approx(nll.value)
    # The model knows a copy by the sixteen bytes before a token, the kind by those that end with it: one is not yet predicted.
    far = rows["loss_by_kind_copied_far"]
    assert far.value == pytest.approx((3.0 + 0.1 * (far.n - 1)) / far.n) and rows["loss_by_kind_new"].value > 2.5
    assert rows["loss_by_kind_number"].n >= 2 and rows["loss_by_kind_name"].n >= 4
    # All of them took the losses from one pass over the text.
    assert backend.asked == 1


def result(kind, short=SHORT, judge=Copier) -> EvalResult:
    made = materials()
    config = dataclasses.replace(made.config, short_context=short)
    made = dataclasses.replace(made, config=config, evaluator=Evaluator(judge, Bytes()))
    return EvalResult("found", LONGEST, rows=tuple(kind.build(made).measure(Copier(), LONGEST, 1, AnswerLog(None))))


def paired(before, after) -> set[str]:
    return {f"{row.task} {row.metric}" for row in compare(before, after)}


def test_losses_of_other_key_tokens_are_not_paired():
    assert paired(result(KeyTokens), result(KeyTokens)) == {"long_perplexity nll", "long_perplexity other_nll"}
    other = result(KeyTokens, judge=Forgetful)
    assert other.select(metric="nll").rows[0].n == result(KeyTokens).select(metric="nll").rows[0].n
    assert paired(result(KeyTokens), other) == set()


def test_copies_from_near_under_another_short_context_are_not_paired():
    before, after = result(LossByKind), result(LossByKind, 2 * SHORT)
    everything = paired(before, before)
    assert {"loss_by_kind_copied_near nll", "loss_by_kind_copied_far nll", "loss_by_kind_new nll"} < everything
    assert paired(before, after) == {name for name in everything if "copied" not in name}


def test_losses_of_sources():
    rows = LossBySource.build(materials()).measure(Copier(), LONGEST, 1, AnswerLog(None))
    assert [row.task for row in rows] == ["loss_by_source_books", "loss_by_source_web"]
    assert rows[0].value == rows[1].value and rows[0].scores == pytest.approx((rows[0].value,), abs=1e-6)


def test_nothing_is_scored_without_tokens():
    made = materials()
    none = dataclasses.replace(made, config=dataclasses.replace(made.config, perplexity_tokens=0))
    assert all(kind.build(none) is None for kind in (KeyTokens, LossByKind, LossBySource, Perplexity))
