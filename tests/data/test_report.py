"""The report's numbers against counts made from the batches, by another road."""

import numpy as np
import pytest

from lcx.core.configs import build, plain
from lcx.core.errors import UserError
from lcx.data.config import DataConfig
from lcx.data.loader import Loader
from lcx.data.report import COLUMNS, inspect


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    """Two corpora in alphabets of their own, so that a token tells its source; documents of many lengths."""
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for letter, mean in (("a", 5), ("b", 3)):
        for i in range(60):
            start = chr(ord(letter.upper()))
            (folder / f"{letter}{i}.txt").write_text(start + letter * int(rng.lognormal(mean, 1)) + f"{i}")
    parts = {
        letter: {
            "weight": weight,
            "source": {"kind": "text", "path": f"{folder}/{letter}*.txt"},
            "packing": {"method": "first_fit", "mask_documents": True},
        }
        for letter, weight in (("a", 0.5), ("b", 0.3))
    }
    parts["task"] = {"kind": "key_value", "weight": 0.2, "source": parts["a"]["source"], "task": {"queries": 1}}
    return Loader(build(DataConfig, {"parts": parts}), 64, 10, seed=0)


def test_shares_equal_independent_counts(loader):
    report = inspect(loader, rows=200)
    counts = dict.fromkeys("ab", 0)
    task = places = real = 0
    for step in range(20):
        batch = loader.batch(step)
        places += batch.tokens.size
        real += int((batch.segments > 0).sum())
        for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
            letters = bytes(tokens[segments > 0].tolist())
            if b"#" in letters:
                task += len(letters)
            else:
                counts["a" if b"a" in letters or b"A" in letters else "b"] += len(letters)
    total = task + sum(counts.values())
    shares = report.token_shares()
    assert total == real
    assert shares == pytest.approx({"a": counts["a"] / total, "b": counts["b"] / total, "task": task / total})
    assert report.fill_ratio == pytest.approx(real / places)
    assert {part.name: part.rows for part in report.parts} == {"a": 100, "b": 60, "task": 40}


def test_lengths_equal_independent_counts(loader):
    report = inspect(loader, rows=200)
    by_name = {part.name: part for part in report.parts}
    for name in "ab":
        seen, tokens = {}, {}
        for step in range(20):
            for line in loader.provenance(step):
                if line.startswith(f"{name}["):
                    for span in line.split(": ", 1)[1].split(", "):
                        path, bounds = span.rsplit("[", 1)
                        start, end = map(int, bounds[:-1].split(":"))
                        with open(path, "rb") as file:
                            seen[path] = len(file.read())
                        tokens[path] = tokens.get(path, 0) + end - start
        part = by_name[name]
        assert part.documents == len(seen)
        for i, (low, high) in enumerate(zip(report.edges[:-1], report.edges[1:], strict=True)):
            inside = [path for path, length in seen.items() if low <= length < high]
            assert part.documents_by_length[i] == len(inside)
            assert part.tokens_by_length[i] == sum(tokens[path] for path in inside)
    assert by_name["task"].documents_by_length[report.edges.index(64)] == 40


def test_loss_counts(loader):
    report = inspect(loader, rows=50)
    weights = np.concatenate([loader.batch(step).loss_weights for step in range(5)])
    assert sum(part.loss_weight for part in report.parts) == pytest.approx(float(weights.sum()))
    assert sum(part.trained for part in report.parts) == int((weights > 0).sum())


def test_samples_table_and_json(loader):
    report = inspect(loader, rows=20, samples=2)
    assert all(len(part.samples) == 2 for part in report.parts)
    assert "A" in report.parts[0].samples[0]
    assert all(len(row) == len(COLUMNS) for row in report.rows())
    assert plain(report)["parts"][0]["rows"] == 10
    with pytest.raises(UserError, match="at least 1"):
        inspect(loader, rows=0)


def test_questions_are_shown_by_skill():
    parts = {"asked": {"kind": "questions", "questions": {"skills": ("copying", "lookup", "counting")}}}
    loader = Loader(build(DataConfig, {"parts": parts}), 1024, 8, seed=0)
    (part,) = inspect(loader, rows=64).parts
    assert [sample.partition(": ")[0] for sample in part.samples] == ["copying", "counting", "lookup"]
    _, rows = loader.addresses(0)
    skills = loader.parts[0].skills(rows)
    openings = {"copying": b"Read these pages", "counting": b"A diary, one", "lookup": b"A list to consult"}
    found = [[skill for skill, opening in openings.items() if opening in bytes(row.tolist())] for row in loader.batch(0).tokens]
    assert found == [[skill] for skill in skills] and len(set(skills)) > 1
    assert inspect(loader, rows=8, samples=0).parts[0].samples == ()
