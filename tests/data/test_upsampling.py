"""Four sources of known lengths: what each way of length upsampling makes of their shares, counted from the rows."""

import dataclasses
import json

import numpy as np
import pytest

from lcx.core.configs import build
from lcx.core.errors import UserError
from lcx.data.config import DataConfig
from lcx.data.loader import Corpus, Loader
from lcx.data.report import UPSAMPLING_COLUMNS, compare_upsampling, inspect

LONG, KEEP = 4096, 0.1
WEIGHTS = {"web": 0.5, "code": 0.2, "papers": 0.2, "books": 0.1}
LENGTHS = {  # (documents, tokens of each), short ones first
    "web": ((3000, 400), (40, 5000)),
    "code": ((2000, 500), (30, 8000)),
    "papers": ((600, 2000), (60, 14000)),
    "books": ((40, 3000), (20, 60000)),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", np.uint8)
    for name, groups in LENGTHS.items():
        with (folder / f"{name}.jsonl").open("w") as file:
            for count, length in groups:
                for _ in range(count):
                    file.write(json.dumps({"text": letters[rng.integers(0, 27, length)].tobytes().decode()}) + "\n")
    parts = {
        name: {
            "weight": WEIGHTS[name],
            "source": {"kind": "jsonl", "path": str(folder / f"{name}.jsonl")},
            "short_tokens": LONG,
            "short_keep": KEEP,
        }
        for name in LENGTHS
    }
    return build(DataConfig, {"parts": parts, "heldout_fraction": 0.0})


@pytest.fixture(scope="module")
def corpus(config):
    return Corpus(config)


def loader(config, corpus, how, rows=20):
    return Loader(dataclasses.replace(config, length_upsampling=how), 1024, rows, seed=0, corpus=corpus)


def by_hand(name, keep):
    """Expected (tokens kept, share of long documents, share of tokens in them) of a source whose short ones stay with `keep`."""
    (short, few), (long, many) = LENGTHS[name]
    tokens = keep * short * few + long * many
    return tokens, long / (keep * short + long), long * many / tokens


def shares(config, corpus, how):
    """Token shares counted from 4,000 rows, as `lcx data inspect` counts them."""
    return inspect(loader(config, corpus, how), 4000, samples=0).token_shares()


@pytest.mark.parametrize("how", ["per_source", "none"])
def test_each_source_keeps_its_budget(config, corpus, how):
    found = shares(config, corpus, how)
    for name, budget in WEIGHTS.items():
        assert found[name] == pytest.approx(budget, rel=0.01)


def test_global_upsampling_shifts_the_mix(config, corpus):
    found = shares(config, corpus, "global")
    kept = {name: by_hand(name, KEEP)[0] / by_hand(name, 1)[0] for name in WEIGHTS}
    total = sum(WEIGHTS[name] * kept[name] for name in WEIGHTS)
    for name, budget in WEIGHTS.items():
        # Thinning draws documents: within four standard deviations of the kept tokens, and of rows a hundredth.
        (short, few), _ = LENGTHS[name]
        spread = 4 * few * (short * KEEP * (1 - KEEP)) ** 0.5 / by_hand(name, KEEP)[0]
        assert found[name] == pytest.approx(budget * kept[name] / total, rel=0.01 + 2 * spread)
    assert found["books"] > 2 * WEIGHTS["books"] and found["web"] < 0.7 * WEIGHTS["web"]


def test_the_share_of_long_documents_rises_as_computed_by_hand(config, corpus):
    for keep, how in ((KEEP, "per_source"), (1, "none")):
        chosen = loader(config, corpus, how)
        for name, part in zip(chosen.names, chosen.parts, strict=True):
            lengths = part.source.lengths
            (short, _), (long, _) = LENGTHS[name]
            _, documents, _ = by_hand(name, keep)
            # The derivative of long / (kept + long) times four standard deviations of the documents that are kept.
            spread = 4 * (short * keep * (1 - keep)) ** 0.5 * long / (keep * short + long) ** 2
            assert (lengths >= LONG).sum() == long
            assert (lengths >= LONG).mean() == pytest.approx(documents, abs=spread + 1e-12)
    # Of the documents of web one in 76 is long, of those that are left about one in 9.
    assert by_hand("web", 1)[1] == pytest.approx(1 / 76) and by_hand("web", KEEP)[1] == pytest.approx(4 / 34)


def test_the_table_is_what_the_rows_hold(config, corpus):
    table = compare_upsampling(loader(config, corpus, "none"))
    assert len(table) == 3 * 5 and len(UPSAMPLING_COLUMNS) == 5
    assert table == compare_upsampling(loader(config, corpus, "global"))
    for how in ("none", "per_source", "global"):
        rows = {found.part: found for found in table if found.how == how}
        report = inspect(loader(config, corpus, how), 4000, samples=0)
        long_bin = report.edges.index(LONG)
        for part in report.parts:
            assert rows[part.name].tokens == pytest.approx(report.token_shares()[part.name], rel=0.01)
            assert rows[part.name].long_tokens == pytest.approx(sum(part.tokens_by_length[long_bin:]) / part.tokens, abs=0.06)
        chosen = {name: part.source for name, part in zip(report.token_shares(), loader(config, corpus, how).parts, strict=True)}
        read = {name: rows[name].tokens / source.num_tokens for name, source in chosen.items()}
        documents = sum(read[name] * len(source.lengths) for name, source in chosen.items())
        long = sum(read[name] * (source.lengths >= LONG).sum() for name, source in chosen.items())
        assert rows["all text"].long_documents == pytest.approx(long / documents)
        assert rows["all text"].tokens == pytest.approx(1)


def test_tasks_keep_their_share_under_global_upsampling(config, corpus):
    task = build(DataConfig, {"parts": {"task": {"kind": "multikey", "weight": 1.0}}}).parts["task"]
    task = dataclasses.replace(task, source=config.parts["web"].source)
    chosen = loader(dataclasses.replace(config, parts={**config.parts, "task": task}), corpus, "global")
    weights = dict(zip(chosen.names, chosen.shares.tolist(), strict=True))
    assert weights["task"] == pytest.approx(0.5)
    alone = shares(config, corpus, "global")
    assert all(weights[name] == pytest.approx(alone[name] / 2, rel=0.01) for name in WEIGHTS)


def test_repeats_count_the_tokens_that_thinning_left(config, corpus):
    for how, keep in (("none", 1), ("per_source", KEEP)):
        (times, names) = loader(config, corpus, how).repeats(100)[config.parts["books"].source]
        rows = 100 * 20 * WEIGHTS["books"]
        assert names == ["books"]
        assert times == pytest.approx(rows * 1024 / by_hand("books", keep)[0], rel=0.05)


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="length_upsampling='per_sorce' is unknown; did you mean 'per_source'"):
        build(DataConfig, {"length_upsampling": "per_sorce"})
