"""Scores of documents and what sources keep by them: rules, reports, and the same bytes however often a run is killed."""

import dataclasses
import json
import math

import numpy as np
import pytest

from lcx.cli.main import main
from lcx.core.configs import build
from lcx.core.errors import UserError
from lcx.data.config import SourceConfig
from lcx.data.curation import select
from lcx.data.curation.config import CuratedSource, CurationConfig, curated, defaults
from lcx.data.curation.pipeline import curate
from lcx.data.curation.scores import Column, ScoreConfig, number, score
from lcx.data.curation.select import KeepRule, at_top, drops


class Digits:
    """The share of digits; a text with `?` has no score, one with `!` makes it fail, by itself and among others."""

    fingerprint = "digits"

    def __init__(self, config):
        if set(config.settings) - {"scale"}:
            raise UserError(f"settings {sorted(config.settings)} are unknown")
        self.scale = config.settings.get("scale", 1.0)
        self.calls = []

    def __call__(self, texts):
        self.calls.append(len(texts))
        if any("!" in text for text in texts):
            raise ValueError("an exclamation mark")
        found = [math.nan if "?" in text else sum(c.isdigit() for c in text) / len(text) for text in texts]
        return np.array(found, np.float32) * self.scale


class Mean:
    """The length of a text above the mean of the corpus."""

    fingerprint = "mean"
    learned = 0

    def learn(self, corpus, folder):
        type(self).learned += 1
        mean = np.mean([len(text) for _, text in corpus()])
        assert [name for name, _ in corpus()] == sorted(name for name, _ in corpus())

        def scorer(texts):
            return np.array([len(text) - mean for text in texts], np.float32)

        return scorer, {"mean": float(mean)}


SCORERS = {"digits": Digits, "mean": lambda config: Mean()}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(folder, source):
    return [json.loads(line) for path in sorted((folder / source).glob("*.jsonl")) for line in path.read_bytes().splitlines()]


def source(folder, pattern="a*.txt", **values):
    return CuratedSource(filters=(), source=SourceConfig("text", f"{folder}/{pattern}"), **values)


@pytest.fixture
def corpus(tmp_path):
    """Twenty texts of 100 characters, number i with i digits; `a21` has no score, `a22` fails, `a23` repeats `a05`."""
    rng = np.random.default_rng(0)
    letters = ["".join(rng.choice(list("abcdefgh "), 100)) for _ in range(23)]
    for i in range(21):
        (tmp_path / f"a{i:02d}.txt").write_text("7" * i + letters[i][i:])
    (tmp_path / "a21.txt").write_text("?" + letters[21])
    (tmp_path / "a22.txt").write_text("!" + letters[22])
    (tmp_path / "a23.txt").write_text((tmp_path / "a05.txt").read_text())
    (tmp_path / "b.txt").write_text("x" * 115)
    return tmp_path


def names(folder, source):
    return [row["name"].split("/")[-1].removesuffix(".txt") for row in rows(folder, source)]


def test_scores_are_written_and_kept_by_a_minimum(corpus):
    config = CurationConfig(
        {"a": source(corpus, keep={"digits": KeepRule(minimum=0.15)}), "b": source(corpus, "b.txt")},
        scores={"digits": ScoreConfig("digits", sources=("a",)), "long": ScoreConfig("mean")},
        shard_bytes=500,
    )
    report = curate(config, corpus / "out", scorers=SCORERS)
    assert names(corpus / "out", "a") == [f"a{i}" for i in range(15, 21)]
    kept, (other,) = rows(corpus / "out", "a"), rows(corpus / "out", "b")
    assert list(kept[0]) == ["name", "source", "bytes", "scores", "text"]
    mean = report["scores"]["long"]["mean"]
    assert mean == pytest.approx((21 * 100 + 2 * 101 + 115) / 24)
    assert kept[0]["scores"] == {"digits": 0.15, "long": number(np.float32(100 - mean))}
    assert other["scores"] == {"long": number(np.float32(115 - mean))}
    dropped = report["sources"]["a"]["dropped"]
    assert dropped["exact"]["documents"] == 1
    assert dropped["score"]["reasons"] == {"digits_ValueError": 1}
    assert dropped["score"]["samples"][0]["error"] == "ValueError: an exclamation mark"
    assert dropped["select"]["reasons"] == {"digits_below_minimum": 15, "digits_missing": 1}
    by_name = {sample["name"].split("/")[-1]: sample for sample in dropped["select"]["samples"]}
    assert by_name["a03.txt"]["scores"]["digits"] == 0.03 and by_name["a03.txt"]["text"].startswith("777")
    assert by_name["a21.txt"]["scores"]["digits"] is None
    assert report["sources"]["b"]["kept"]["documents"] == 1 and report["sources"]["b"]["dropped"]["select"]["documents"] == 0


def test_the_report_shows_documents_of_each_decile(corpus):
    config = CurationConfig({"a": source(corpus)}, scores={"digits": ScoreConfig("digits")})
    found = curate(config, corpus / "out", scorers=SCORERS)["sources"]["a"]["scores"]["digits"]
    assert (found["kind"], found["documents"], found["missing"], found["failed"]) == ("digits", 23, 1, 1)
    assert found["deciles"] == [number(np.float32(i) / 100) for i in range(0, 21, 2)]
    assert found["mean"] == pytest.approx(0.1)
    # 0.00 to 0.20 in 24 bins: a value i falls into bin 24 * i / 20, the maximum into the last one.
    assert found["histogram"] == [sum(min(24 * i // 20, 23) == bin for i in range(21)) for bin in range(24)]
    assert [len(decile) for decile in found["samples"]] == [3, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    values = [sample["value"] for decile in found["samples"] for sample in sorted(decile, key=lambda one: one["value"])]
    assert values == [number(np.float32(i) / 100) for i in range(21)]
    # Without a rule, a document that has no score stays, and one that made the scorer fail does not.
    assert names(corpus / "out", "a") == [f"a{i:02d}" for i in range(22)]


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (KeepRule(top_share=0.1), [18, 19, 20]),  # 2.1 of 21
        (KeepRule(top_share=1 / 3), list(range(14, 21))),  # exactly 7
        (KeepRule(top_share=0.1, by="bytes"), [18, 19, 20]),
        (KeepRule(top_share=1.0), list(range(21))),
        (KeepRule(minimum=0.2), [20]),
    ],
)
def test_what_a_rule_keeps(corpus, rule, kept):
    config = CurationConfig({"a": source(corpus, keep={"digits": rule})}, scores={"digits": ScoreConfig("digits")})
    curate(config, corpus / "out", scorers=SCORERS)
    assert names(corpus / "out", "a") == [f"a{i:02d}" for i in kept]


def test_the_top_by_hand():
    values = np.array([1.0, 3.0, 3.0, 2.0, 3.0], np.float32)
    ones, sizes = np.ones(5, np.int64), np.array([10, 50, 5, 35, 100], np.int64)
    assert at_top(values, ones, 0.4).tolist() == [False, True, True, False, False]  # of equal scores the first
    assert at_top(values, ones, 0.41).tolist() == [False, True, True, False, True]
    assert at_top(values, sizes, 0.25).tolist() == [False, True, False, False, False]  # 50 of 200
    assert at_top(values, sizes, 0.26).tolist() == [False, True, True, False, False]
    assert at_top(values, sizes, 0.28).tolist() == [False, True, True, False, True]
    assert at_top(np.zeros(0, np.float32), np.zeros(0, np.int64), 0.5).tolist() == []
    assert at_top(np.arange(100.0), np.ones(100, np.int64), 0.07).sum() == 7


def test_every_rule_is_about_all_documents():
    scores = {"x": np.array([4, 3, 2, 1, np.nan], np.float32), "y": np.array([1, 2, 3, np.nan, 4], np.float32)}
    rules = {"y": KeepRule(minimum=1.5), "x": KeepRule(top_share=0.5)}
    found = drops(rules, scores, np.ones(5, np.int64))
    assert found == {0: "y_below_minimum", 2: "x_not_at_top", 3: "x_not_at_top", 4: "x_missing"}


def test_a_column_is_read_back_to_the_bit():
    values = np.random.default_rng(1).standard_normal(1000).astype(np.float32) * np.float32(1e-3)
    values[7] = np.nan
    back = Column.from_json(Column(values, {3: ("E", "E: no")}).to_json())
    assert back.values.tobytes() == values.tobytes() and back.errors == {3: ("E", "E: no")}


def test_what_is_no_number_is_no_score():
    found = score("x", lambda texts: np.array([1.0, np.inf, np.nan, -np.inf], np.float64), list("abcd"))
    assert found.values.dtype == np.float32 and np.isnan(found.values).tolist() == [False, True, True, True] and not found.errors
    with pytest.raises(UserError, match=r"config.scores.x gave float64\(1,\), not 2 numbers"):
        score("x", lambda texts: np.zeros(1), ["a", "b"])


def test_one_that_fails_among_many_is_found():
    scorer = Digits(ScoreConfig("digits"))
    found = score("x", scorer, ["1a", "!", "11", "?"])
    assert scorer.calls == [4, 1, 1, 1, 1]
    assert found.values.tolist()[::2] == [0.5, 1.0] and np.isnan(found.values[[1, 3]]).all() and list(found.errors) == [1]


def with_scores(folder, **changes):
    config = CurationConfig(
        {"a": source(folder, keep={"digits": KeepRule(top_share=0.5), "long": KeepRule(minimum=-50.0)})},
        scores={"digits": ScoreConfig("digits"), "long": ScoreConfig("mean")},
        shard_bytes=300,
    )
    return dataclasses.replace(config, **changes)


def test_a_run_stopped_anywhere_ends_with_the_same_bytes(corpus):
    """Stopped at the end of every shard of every step, and with another number of workers."""
    config, seen = with_scores(corpus), []
    curate(config, corpus / "whole", scorers=SCORERS, report=seen.append)
    assert {one.done for one in seen} == {"judged", "scored by digits", "scored by long"}
    learned, fresh = Mean.learned, []

    class Stopped(BaseException):
        pass

    for _ in range(len(seen)):

        def stop(progress):
            if progress.fresh_bytes:
                fresh.append(progress)
                raise Stopped

        with pytest.raises(Stopped):
            curate(config, corpus / "out", workers=1, scorers=SCORERS, report=stop)
    assert [(one.done, one.source, one.shards, one.bytes) for one in fresh] == [
        (one.done, one.source, one.shards, one.bytes) for one in seen
    ]
    curate(config, corpus / "out", workers=2, scorers=SCORERS)
    assert contents(corpus / "out") == contents(corpus / "whole")
    assert Mean.learned > learned
    curate(config, corpus / "out", scorers=SCORERS)
    assert contents(corpus / "out") == contents(corpus / "whole")


def test_a_folder_belongs_to_its_scores(corpus):
    curate(with_scores(corpus), corpus / "out", scorers=SCORERS)
    other = with_scores(corpus, scores={"digits": ScoreConfig("digits", {"scale": 2.0}), "long": ScoreConfig("mean")})
    with pytest.raises(UserError, match="holds another curation .config.scores.digits.settings"):
        curate(other, corpus / "out", scorers=SCORERS)

    def newer(config):
        scorer = Digits(config)
        scorer.fingerprint = "digits 2"
        return scorer

    with pytest.raises(UserError, match="another curation .config.scorers.digits is 'digits', not 'digits 2'"):
        curate(with_scores(corpus), corpus / "out", scorers=SCORERS | {"digits": newer})


def test_without_scores_a_report_has_none(corpus):
    curate(CurationConfig({"a": source(corpus)}), corpus / "out")
    report = json.loads((corpus / "out" / "report.json").read_text())
    assert list(report) == ["format", "sources"]
    assert list(report["sources"]["a"]) == ["source", "read", "kept", "lengths", "dropped"]
    assert list(report["sources"]["a"]["dropped"]) == ["read", "decontaminate", "exact", "minhash", "failed"]
    assert list(rows(corpus / "out", "a")[0]) == ["name", "source", "bytes", "text"]


def test_a_folder_of_an_older_lcx_is_refused(corpus):
    curate(CurationConfig({"a": source(corpus)}), corpus / "out")
    path = corpus / "out" / "curation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
    with pytest.raises(UserError, match="holds another curation .config.format is 1, not 2.; use a new folder or delete it"):
        curate(CurationConfig({"a": source(corpus)}), corpus / "out")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scores": {"a/b": {"kind": "x"}}}, "config.scores has the name 'a/b'"),
        (
            {"scores": {"x": {"kind": "x", "sources": ("bok",)}}},
            "config.scores.x.sources='bok' is unknown; .* 'books'",
        ),
        ({"scores": {"x": {}}}, "config.scores.x is missing a value for kind"),
        ({"keep": {"digit": {"minimum": 1}}}, "keep.digit is about no score of config.scores; did you mean 'digits'"),
        ({"keep": {"other": {"minimum": 1}}}, "keep.other needs 'books' in config.scores.other.sources; add it there"),
        ({"keep": {"digits": {}}}, "either minimum or top_share; set one"),
        ({"keep": {"digits": {"minimum": 1, "top_share": 0.5}}}, "either minimum or top_share; set one"),
        ({"keep": {"digits": {"top_share": 0.0}}}, "top_share=0.0 must be above 0 and at most 1"),
        ({"keep": {"digits": {"top_share": 1.5}}}, "top_share=1.5 must be above 0 and at most 1"),
        ({"keep": {"digits": {"top_share": 0.5, "by": "byte"}}}, "did you mean 'bytes'"),
        ({"keep": {"digits": {"minimum": 1, "by": "bytes"}}}, "keep.by='bytes' is about top_share, which is not set"),
    ],
)
def test_wrong_configs(values, message):
    scores = {"digits": {"kind": "digits"}, "other": {"kind": "digits", "sources": ("web",)}}
    sources = {"books": {"keep": values.pop("keep", {})}, "web": {}}
    with pytest.raises(UserError, match=message):
        build(CurationConfig, {"sources": sources, "scores": scores, **values})


def test_a_kind_without_a_factory(corpus):
    config = CurationConfig({"a": source(corpus)}, scores={"x": ScoreConfig("digit")})
    with pytest.raises(UserError, match="config.scores.x.kind='digit' has no scorer here; did you mean 'digits'"):
        curate(config, corpus / "out", scorers=SCORERS)
    assert not (corpus / "out").exists()


def test_scores_and_rules_of_a_config_file_are_read_and_reached_by_flags(corpus, capsys):
    scores = {"x": {"kind": "digits", "settings": {"scale": 2.0}}}
    built = defaults({"scores": scores}, a=curated("long", keep={"x": {"top_share": 0.5}}))
    config = build(CurationConfig, built.to_dict())
    assert config.sources["a"].keep["x"] == KeepRule(top_share=0.5) and config.scores["x"].settings == {"scale": 2.0}
    (corpus / "config.py").write_text(
        "from lcx.data.curation.config import curated, defaults\n\n"
        "def get_config():\n"
        "    scores = {'x': {'kind': 'nothing', 'settings': {}}}\n"
        f"    return defaults({{'scores': scores}}, a=curated('long', source={{'kind': 'text', 'path': '{corpus}/*.txt'}}))\n"
    )
    with pytest.raises(SystemExit):
        main(["data", "curate", f"--config={corpus}/config.py", "--config.scores.x.kind=none", f"--out={corpus}/out"])
    assert "config.scores.x.kind='none' has no scorer here" in capsys.readouterr().err.replace("\n", " ")


def test_deciles_of_few_documents():
    column = Column(np.array([2, np.nan, 1], np.float32))
    content, shown = select.summary(ScoreConfig("x"), column, ["a", "b", "c"], samples=9)
    assert content["deciles"] == [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    assert shown == {2: 0, 0: 1} and content["missing"] == 1
    content, shown = select.summary(ScoreConfig("x"), Column(np.full(2, np.nan, np.float32)), ["a", "b"], samples=9)
    assert content["deciles"] == [] and content["mean"] is None and shown == {}
