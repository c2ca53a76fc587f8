"""The quality classifier: figures by hand, labels from everywhere, planted quality, and what is refused."""

import json
import math
import random
import re
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.data.config import SourceConfig
from lcx.data.curation import labels
from lcx.data.curation.classifier import auc, fit, held_out_figures
from lcx.data.curation.config import CuratedSource, CurationConfig
from lcx.data.curation.labels import EndpointLabels, excerpt, grade_of
from lcx.data.curation.pipeline import curate
from lcx.data.curation.quality import BUCKETS, trigrams
from lcx.data.curation.scores import ScoreConfig
from lcx.data.curation.select import KeepRule

pytest.importorskip("sklearn", reason="the extra data")


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    p, good = rng.integers(0, 8, 60) / 8, rng.random(60) < 0.4
    pairs = [(1.0 if a > b else 0.5 if a == b else 0.0) for a in p[good] for b in p[~good]]
    assert auc(p, good) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auc(np.array([0.1, 0.9]), np.array([False, True])) == 1.0


def test_figures_by_hand():
    p = np.array([0.95, 0.9, 0.55, 0.5, 0.45, 0.1, 1.0])
    good = np.array([True, True, False, True, True, False, False])
    found = held_out_figures(p, good)
    assert found["precision"] == 0.6 and found["recall"] == 0.75
    filled = {row["from"]: row for row in found["calibration"] if row["documents"]}
    assert {key: row["documents"] for key, row in filled.items()} == {0.1: 1, 0.4: 1, 0.5: 2, 0.9: 3}
    assert filled[0.9]["predicted"] == 0.95 and filled[0.9]["good"] == pytest.approx(2 / 3, abs=1e-6)
    assert held_out_figures(np.array([0.1, 0.2]), np.array([True, False]))["precision"] is None


def test_the_fit_is_where_the_gradient_of_the_formula_is_zero():
    rng = np.random.default_rng(1)
    x, penalty = rng.standard_normal((80, 3)), 0.3
    good = x[:, 0] + rng.standard_normal(80) > 0
    found = fit(x, good, penalty)
    p = 1 / (1 + np.exp(-(x @ found.weights_F + found.bias)))
    assert np.abs(x.T @ (good - p) - penalty * found.weights_F).max() < 1e-2 and abs((good - p).sum()) < 1e-2
    assert np.allclose(found(x), p, atol=1e-6)


def test_trigrams_by_hand():
    found = trigrams("abcabc")
    counts = np.sort(found[found > 0] / found[found > 0].min())
    assert np.allclose(counts, [1, 1, math.log(3) / math.log(2)], rtol=1e-6) and np.linalg.norm(found) == pytest.approx(1)
    assert found.shape == (BUCKETS,) and not trigrams("ab").any()


@pytest.mark.parametrize(
    ("answer", "grade"),
    [
        *(("3", 3), ("4.5", 4.5), (" 2\n", 2), ("Grade: 5", 5), ("The grade is 4.", 4), ("**3**/5", 3), ("score 0: noise", 0)),
        *(("7", None), ("", None), ("I would say 3", None), ("12", None), ("3rd", None), ("-", None)),
    ],
)
def test_grades_that_are_understood(answer, grade):
    assert grade_of(answer) == grade


def test_an_excerpt_has_start_middle_and_end():
    text = "s" * 100 + "m" * 100 + "e" * 100
    found = excerpt(text, 30)
    assert found == "s" * 10 + "\n[...]\n" + "m" * 10 + "\n[...]\n" + "e" * 10 and excerpt(text, 300) == text


def shuffled(text, rng):
    """Words change places, white space stays where it is."""
    parts = re.split(r"(\s+)", text)
    some = parts[::2]
    rng.shuffle(some)
    parts[::2] = some
    return "".join(parts)


def boilerplate(text, rng):
    lines = [line.strip()[:40] for line in text.splitlines() if line.strip()]
    menu, out = rng.sample(lines, min(6, len(lines))), []
    while sum(map(len, out)) < len(text):
        out.append(" | ".join(rng.sample(menu, min(4, len(menu)))))
    return "\n".join(out)


def noise(text, rng):
    return "".join(chr(rng.randrange(33, 127)) if rng.random() < 0.4 else c for c in text)


BAD = (shuffled, boilerplate, noise)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Passages of the standard library, as many made bad, as files; and a file of labels by name."""
    folder, rng = tmp_path_factory.mktemp("planted"), random.Random(0)
    texts = [path.read_text(errors="ignore") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    clean = [text[at : at + 2500] for text in texts for at in range(0, len(text) - 2500, 2500)][::4][:400]
    assert len(clean) == 400
    rows = []
    for i, text in enumerate(clean):
        for kind, content in (("good", text), ("bad", BAD[i % 3](text, rng))):
            path = folder / f"{i:03d}{kind}.txt"
            path.write_text(content)
            rows.append({"name": str(path), "label": int(kind == "good")})
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(folder, settings, pattern="*.txt", **keep):
    return CurationConfig(
        {"a": CuratedSource(filters=(), source=SourceConfig("text", f"{folder}/{pattern}"), keep=keep)},
        minhash=None,
        scores={"quality": ScoreConfig("quality", settings)},
        shard_bytes=200_000,
    )


def names(folder):
    rows = [json.loads(line) for path in sorted((folder / "a").glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [row["name"].split("/")[-1].removesuffix(".txt") for row in rows]


@pytest.mark.parametrize("kind", [pytest.param("wordllama", marks=pytest.mark.slow), "hashed"])
def test_planted_quality_is_found(planted, tmp_path, kind):
    """Half of the documents are labelled; the others stay if they are good."""
    if kind == "wordllama":
        pytest.importorskip("wordllama", reason="not installed")
    rows = [json.loads(line) for line in (planted / "labels.jsonl").read_text().splitlines()]
    (tmp_path / "some.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows if int(row["name"].split("/")[-1][:3]) < 250)
    )
    settings = {"labels": {"file": {"path": f"{tmp_path}/some.jsonl"}}, "embedding": {"kind": kind}}
    report = curate(config_of(planted, settings, quality=KeepRule(minimum=0.5)), tmp_path / "out")
    learned = report["scores"]["quality"]
    (figures,) = learned["rounds"]
    assert learned["embedding"] == kind and learned["features"] == 256 + BUCKETS
    assert learned["labels"] == {"from": "file", "rows": 500, "names_without_document": 0, "labelled": 500, "used": 500}
    assert learned["train"] == {"good": 200, "not_good": 200} and learned["held_out"] == {"good": 50, "not_good": 50}
    assert figures["auc"] >= 0.97, figures
    unseen = [name for name in names(tmp_path / "out") if int(name[:3]) >= 250]
    good = sum(name.endswith("good") for name in unseen)
    assert good >= 0.9 * 150 and len(unseen) - good <= 0.1 * 150
    assert report["sources"]["a"]["dropped"]["select"]["reasons"].keys() == {"quality_below_minimum"}


def few(folder, tmp_path, count=40):
    """A config of the first documents alone, quick to learn from."""
    rows = [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()][:count]
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"labels": {"file": {"path": str(path)}}, "embedding": {"kind": "hashed"}}


def test_rounds_add_what_the_classifier_is_sure_about(planted, tmp_path):
    settings = few(planted, tmp_path) | {"rounds": 3, "confidence": 0.8, "round_documents": 60}
    found = curate(config_of(planted, settings, "0*.txt"), tmp_path / "out")["scores"]["quality"]["rounds"]
    assert len(found) == 3 and (found[0]["added_good"], found[0]["added_not_good"]) == (0, 0)
    assert all(0 < one["added_good"] + one["added_not_good"] <= 60 for one in found[1:])
    assert all(0 <= one["auc"] <= 1 for one in found)


def test_a_killed_run_learns_again_and_ends_with_the_same_bytes(planted, tmp_path):
    config = config_of(planted, few(planted, tmp_path), "0[0-4]*.txt", quality=KeepRule(top_share=0.5))
    curate(config, tmp_path / "whole")

    class Killed(BaseException):
        pass

    def kill(progress):
        if progress.done == "scored by quality" and progress.shards == 1:
            raise Killed

    with pytest.raises(Killed):
        curate(config, tmp_path / "out", report=kill)
    curate(config, tmp_path / "out", workers=2)
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
    assert len(names(tmp_path / "out")) == 50


def test_labels_may_come_with_texts_of_their_own(planted, tmp_path):
    rows = [json.loads(line) for line in (planted / "labels.jsonl").read_text().splitlines()][:40]
    graded = [{"text": Path(row["name"]).read_text(), "grade": 4 if row["label"] else 2.5} for row in rows]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in graded))
    file = {"path": f"{tmp_path}/texts.jsonl", "field": "grade", "threshold": 3}
    settings = {"labels": {"file": file}, "embedding": {"kind": "hashed"}}
    learned = curate(config_of(planted, settings, "3*.txt"), tmp_path / "out")["scores"]["quality"]
    assert learned["labels"]["used"] == 40 and learned["train"] == {"good": 16, "not_good": 16}


def test_vectors_of_the_user(planted, tmp_path):
    """Vectors that know the answer; a document without one has no score."""
    paths = sorted(planted.glob("0[0-4]*.txt"))
    vectors = np.array([[1.0, 0.1] if path.stem.endswith("good") else [0.1, 1.0] for path in paths])
    np.savez(tmp_path / "v.npz", names=np.array(list(map(str, paths[:-1]))), vectors=vectors[:-1])
    settings = few(planted, tmp_path) | {"embedding": {"path": f"{tmp_path}/v.npz"}, "trigrams": False}
    report = curate(config_of(planted, settings, "0[0-4]*.txt", quality=KeepRule(minimum=0.5)), tmp_path / "out")
    assert report["scores"]["quality"]["embedding"] == "vectors"
    assert report["sources"]["a"]["dropped"]["select"]["reasons"] == {"quality_below_minimum": 50, "quality_missing": 1}


class Model:
    """A model behind an endpoint that likes documents with `def`; knows how often it was asked."""

    def __init__(self, nonsense=0):
        self.asked, self.nonsense, self.configs = [], nonsense, []

    def __call__(self, config):
        self.configs.append(config)
        return self.answers

    def answers(self, prompts):
        for number in reversed(range(len(prompts))):
            self.asked.append(prompts[number])
            text = prompts[number].split("\n\nText:\n")[1]
            yield {number: "No idea." if len(self.asked) <= self.nonsense else "Grade: 4" if "def " in text else "1"}


ENDPOINT = {"url": "http://nowhere/v1", "model": "m", "documents": 60}


def test_an_endpoint_is_asked_once(planted, tmp_path):
    settings = {"labels": {"endpoint": ENDPOINT}, "embedding": {"kind": "hashed"}}
    config, model = config_of(planted, settings, "0[0-4]*.txt"), Model(nonsense=3)
    found = curate(config, tmp_path / "out", ask=model)["scores"]["quality"]["labels"]
    assert (found["from"], found["model"], found["requests"], found["unread"], found["used"]) == ("endpoint", "m", 60, 3, 57)
    assert found["grades"]["4"] + found["grades"]["1"] == 57 and len(set(model.asked)) == 60
    cached = (tmp_path / "out" / labels.ANSWERS).read_bytes()
    assert len(cached.splitlines()) == 60
    # Another curation with the same cache, whose last line is torn, asks for that alone.
    (tmp_path / "cache.jsonl").write_bytes(cached[:-5])
    other = config_of(planted, {**settings, "labels": {"endpoint": ENDPOINT | {"cache": f"{tmp_path}/cache.jsonl"}}}, "0[0-4]*.txt")
    again = Model()
    # What the report says does not depend on who had been asked before.
    assert curate(other, tmp_path / "again", ask=again)["scores"]["quality"]["labels"] == found and len(again.asked) == 1
    assert len((tmp_path / "cache.jsonl").read_bytes().splitlines()) == 60


def test_nonsense_and_silence(planted, tmp_path):
    config = config_of(planted, {"labels": {"endpoint": ENDPOINT}, "embedding": {"kind": "hashed"}}, "0[0-4]*.txt")
    with pytest.raises(UserError, match=r"m at http://nowhere/v1 gave no grade for 13 of 60 documents, but 'No idea.'; change"):
        curate(config, tmp_path / "out", ask=Model(nonsense=13))

    def down(config):
        def answers(prompts):
            yield {0: "3"}
            raise UserError("http://nowhere/v1 cannot be reached; is the server running?")

        return answers

    with pytest.raises(UserError, match="cannot be reached"):
        curate(config, tmp_path / "down", ask=down)
    assert len((tmp_path / "down" / labels.ANSWERS).read_text().splitlines()) == 1
    with pytest.raises(UserError, match="labels.endpoint needs a caller that asks endpoints"):
        curate(config, tmp_path / "none")


class Ratio:
    """Stands for a likelihood ratio: the share of letters; one text makes it fail."""

    fingerprint = "ratio"

    def __call__(self, texts):
        if any("000good" in text for text in texts):
            raise ValueError
        return np.array([sum(c.isalpha() for c in text) / len(text) for text in texts], np.float32)


def test_another_score_may_give_the_labels(planted, tmp_path):
    settings = {"labels": {"score": {"score": {"kind": "ratio"}, "documents": 80}}, "embedding": {"kind": "hashed"}}
    config = config_of(planted, settings, "0[0-4]*.txt")
    found = curate(config, tmp_path / "out", scorers={"ratio": lambda config: Ratio()})["scores"]["quality"]
    assert found["labels"] == {"from": "score", "kind": "ratio", "documents": 80, "missing": 0, "labelled": 48, "used": 48}
    assert found["train"]["good"] + found["held_out"]["good"] == 24
    with pytest.raises(UserError, match="kind='ratoi' has no scorer here; did you mean 'ratio'"):
        settings["labels"]["score"]["score"]["kind"] = "ratoi"
        curate(config_of(planted, settings), tmp_path / "x", scorers={"ratio": lambda config: Ratio()})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "labels.file.path='.*labels.jsonl' cannot be read"),
        (
            '{"name": "x", "label": 1}\n{"name": "y", "label": 0}\n',
            "labels nothing here: none of its 2 names is that of a document",
        ),
        ("", "labels nothing here: it has no rows"),
        ('{"text": "x", "label": "good"}\n', "labels.jsonl:1 has no name or text, or no number in 'label'"),
        ('{"label": 1}\n', "labels.jsonl:1 has no name or text"),
        ('{"text": "x", "label": 1}\n[1]\n', "labels.jsonl:2 is no JSON object"),
        ('{"text": "x", "label": 1}\n{"te\n', "cannot be read"),
        (
            "".join(f'{{"text": "text {i}", "label": 1}}\n' for i in range(20)),
            "0 of 20 labelled documents are not good, .* needs 5",
        ),
    ],
)
def test_wrong_labels_are_one_sentence(planted, tmp_path, content, message):
    if content is not None:
        (tmp_path / "labels.jsonl").write_text(content)
    settings = {"labels": {"file": {"path": f"{tmp_path}/labels.jsonl"}}, "embedding": {"kind": "hashed"}}
    with pytest.raises(UserError, match=message):
        curate(config_of(planted, settings, "00*.txt"), tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "quality.settings is missing a value for labels"),
        ({"labels": {}}, "has to have one of file, endpoint and score"),
        ({"labels": {"file": {}}}, "labels.file.path is missing"),
        ({"labels": {"endpoint": {"url": "http://x"}}}, "needs url and model"),
        ({"labels": {"file": {"path": "x"}}, "held_out": 1.0}, "held_out=1.0 must be between 0 and 1"),
        ({"labels": {"file": {"path": "x"}}, "confidence": 0.4}, "confidence=0.4 must be at least 0.5"),
        ({"labels": {"score": {"score": {"kind": "x"}, "good_share": 0.8}}}, "come to more than 1"),
        ({"labels": {"file": {"path": "x"}}, "round": 2}, "did you mean 'rounds'"),
    ],
)
def test_wrong_settings(planted, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        curate(config_of(planted, settings), tmp_path / "out")


def test_a_document_that_cannot_be_embedded_has_no_label_and_no_score(planted, tmp_path):
    class Hidden:
        kind, fingerprint = "hidden", "hidden"

        def __call__(self, texts, names=()):
            if any("\nimport" in text for text in texts):
                raise RuntimeError("no imports")
            return np.array([[len(set(text)) / 100, 1.0] for text in texts], np.float32)

    settings = few(planted, tmp_path) | {"embedding": {"model": "m"}}
    config = config_of(planted, settings, "0[0-4]*.txt")
    report = curate(config, tmp_path / "out", embedders={"hidden": lambda config: Hidden()})
    used = report["scores"]["quality"]["labels"]["used"]
    assert 10 < used < 40
    assert report["sources"]["a"]["dropped"]["score"]["reasons"] == {
        "quality_RuntimeError": sum("\nimport" in path.read_text() for path in planted.glob("0[0-4]*.txt"))
    }


def test_without_scikit_learn(planted, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UserError, match=r"a quality classifier needs the sklearn.linear_model library; .*'\.\[data\]'"):
        curate(config_of(planted, {"labels": {"file": {"path": f"{planted}/labels.jsonl"}}}), tmp_path / "out")


def test_an_endpoint_is_asked_about_something():
    with pytest.raises(UserError, match="must be above 0"):
        EndpointLabels("http://x", "m", documents=0)
