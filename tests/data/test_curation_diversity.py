"""Diversity: each formula against loops in float64 or cases by hand, and the step in a curation."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from lcx.core.configs import build
from lcx.core.errors import UserError
from lcx.data.config import SourceConfig
from lcx.data.curation import diversity
from lcx.data.curation.config import CuratedSource, CurationConfig
from lcx.data.curation.diversify import (
    MAP,
    BalanceSettings,
    DiversityConfig,
    KCenterSettings,
    ReferenceSettings,
    SemDeDupSettings,
)
from lcx.data.curation.diversity import Rows, cluster_balanced, k_center, k_means, plane, quotas, semantic_duplicates, vendi
from lcx.data.curation.embed import EmbedConfig, normalised
from lcx.data.curation.pipeline import curate
from lcx.data.curation.scores import ScoreConfig
from lcx.data.curation.select import KeepRule


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(diversity, "BLOCK", 7)


def unit(seed, count, dim):
    return normalised(np.random.default_rng(seed).standard_normal((count, dim)))


def radius(x, chosen):
    return max(min(np.linalg.norm(x[i].astype(np.float64) - x[j]) for j in chosen) for i in range(len(x)))


@pytest.mark.parametrize("seed", range(5))
def test_k_center_is_greedy_and_within_twice_the_best(seed):
    x, count = unit(seed, 14, 3), 4
    chosen = k_center(x, count).tolist()
    expected = [0]
    while len(expected) < count:
        gaps = [min(np.linalg.norm(x[i].astype(np.float64) - x[j]) for j in expected) for i in range(len(x))]
        expected.append(int(np.argmax(gaps)))
    assert chosen == expected
    best = min(radius(x, some) for some in itertools.combinations(range(len(x)), count))
    assert best <= radius(x, chosen) <= 2 * best


def test_k_center_of_copies_takes_each_once():
    assert sorted(k_center(np.ones((5, 2), np.float32), 9).tolist()) == [0, 1, 2, 3, 4]
    assert k_center(np.zeros((0, 2), np.float32), 3).tolist() == []


def vendi_by_definition(x, q):
    x = x.astype(np.float64)
    values = np.linalg.eigvalsh(x @ x.T / len(x))
    values = values[values > 1e-9]
    if q == 1:
        return math.exp(-sum(value * math.log(value) for value in values))
    if math.isinf(q):
        return 1 / values.max()
    return sum(value**q for value in values) ** (1 / (1 - q))


@pytest.mark.parametrize("q", [0, 0.5, 1, 2, math.inf])
@pytest.mark.parametrize(("count", "dim"), [(30, 6), (6, 30), (12, 12)])
def test_vendi_in_both_forms(q, count, dim):
    x = unit(3, count, dim)
    assert vendi(x, q) == pytest.approx(vendi_by_definition(x, q), rel=1e-5)


@pytest.mark.parametrize("q", [0, 0.5, 1, 2, math.inf])
def test_vendi_by_hand(q):
    """Four copies count as one, four at right angles as four; of two kinds, 3 to 1, λ are ¾ and ¼."""
    assert vendi(np.repeat(unit(0, 1, 9), 4, 0), q) == pytest.approx(1)
    assert vendi(np.eye(4, dtype=np.float32), q) == pytest.approx(4)
    kinds = np.eye(2, dtype=np.float32)[[0, 0, 0, 1]]
    expected = {0: 2, 0.5: (0.75**0.5 + 0.25**0.5) ** 2, 1: math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), 2: 1.6}
    assert vendi(kinds, q) == pytest.approx(expected.get(q, 4 / 3))
    assert vendi(np.zeros((0, 3), np.float32), q) == 0 and vendi(np.zeros((2, 3), np.float32), q) == 1


def planted_clusters(sizes, seed=0, spread=0.05, dim=8):
    """Groups of vectors around axes, mixed."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return normalised(np.eye(dim)[labels] + spread * rng.standard_normal((len(labels), dim))), labels


def test_k_means_finds_planted_clusters():
    x, truth = planted_clusters([40, 20, 30, 5])
    centers, found, cosines = k_means(x, 4, seed=1)
    pairs = set(zip(truth.tolist(), found.tolist(), strict=True))
    assert len(pairs) == 4 and found.dtype == np.int32
    for group, cluster in pairs:
        mean = x[truth == group].astype(np.float64).mean(0)
        assert np.allclose(centers[cluster], mean / np.linalg.norm(mean), atol=1e-5)
    assert np.allclose(cosines, [x[i] @ centers[found[i]] for i in range(len(x))], atol=1e-6)
    again = k_means(Rows(x, np.arange(len(x))), 4, seed=1)
    assert all((one == other).all() for one, other in zip(again, (centers, found, cosines), strict=True))


def test_k_means_with_few_different_documents():
    x = np.repeat(np.eye(3, dtype=np.float32), 4, 0)
    centers, found, _ = k_means(x, 6, seed=0)
    assert len(centers) == 6 and len({tuple(found[i : i + 4]) for i in (0, 4, 8)}) == 3
    assert len(k_means(x[:2], 6, seed=0)[0]) == 2


def test_k_means_is_fitted_to_a_sample(monkeypatch):
    monkeypatch.setattr(diversity, "FIT_PER_CLUSTER", 10)
    x, truth = planted_clusters([100, 100, 100])
    _, found, _ = k_means(x, 3, seed=0)
    assert len(found) == 300 and len(set(zip(truth.tolist(), found.tolist(), strict=True))) == 3


@pytest.mark.parametrize("keep", ["hard", "easy", "random"])
def test_semdedup_is_a_loop_over_pairs(keep):
    x, labels = planted_clusters([15, 25, 1, 10], spread=0.15)
    centers = normalised(np.array([x[labels == i].mean(0) for i in range(4)]))
    found = semantic_duplicates(x, labels, centers, 0.08, keep, seed=0)
    assert 5 < len(found) < 45
    for cluster in range(4):
        members = np.flatnonzero(labels == cluster).tolist()
        if keep == "random":
            # Whoever is in front of it is as alike, and someone of each such group stays.
            assert all(x[i] @ x[found[i]] > 0.92 for i in members if i in found)
            assert any(i not in found for i in members)
            continue
        to_center = {i: float(x[i] @ centers[cluster]) for i in members}
        order = sorted(members, key=lambda i: to_center[i] if keep == "hard" else -to_center[i])
        for place, i in enumerate(order):
            alike = [float(x[i].astype(np.float64) @ x[j]) for j in order[:place]]
            assert (i in found) == bool(alike and max(alike) > 0.92)
            assert i not in found or found[i] == order[int(np.argmax(alike))]


def test_semdedup_on_planted_pairs():
    """Of each pair one goes; hard keeps the one farther from the center, easy the nearer one."""
    base = unit(5, 12, 16)
    x = np.concatenate([base, normalised(base + 0.01 * unit(6, 12, 16))])
    labels, center = np.zeros(24, np.int32), normalised(x.mean(0, keepdims=True))
    for keep, sign in (("hard", 1), ("easy", -1)):
        found = semantic_duplicates(x, labels, center, 0.01, keep, seed=0)
        assert len(found) == 12 and all(abs(one - other) == 12 for one, other in found.items())
        assert all(sign * (x[one] - x[other]) @ center[0] >= 0 for one, other in found.items())


@pytest.mark.parametrize(
    ("sizes", "total", "tau", "expected"),
    [
        ([100, 100, 100], 30, 0.0, [10, 10, 10]),
        ([100, 50, 10], 32, 1.0, [20, 10, 2]),
        ([100, 25, 4], 34, 0.5, [20, 10, 4]),
        ([100, 100, 4], 64, 0.0, [30, 30, 4]),  # the small one is full, the others share the rest
        ([5, 0, 3], 20, 0.5, [5, 0, 3]),
        ([10, 10, 10], 4, 0.0, [2, 1, 1]),
        ([], 5, 0.5, []),
    ],
)
def test_quotas_by_hand(sizes, total, tau, expected):
    assert quotas(np.array(sizes, np.int64), total, tau).tolist() == expected


def test_quotas_come_to_the_total():
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(0, 50, rng.integers(1, 9))
        total, tau = int(rng.integers(0, 200)), float(rng.random())
        found = quotas(sizes, total, tau)
        assert found.sum() == min(total, sizes.sum()) and (found <= sizes).all() and (found >= 0).all()


def test_clusters_are_thinned_at_random_but_alike():
    labels = np.repeat([0, 1], [90, 10])
    found = cluster_balanced(labels, 20, 0.0, seed=3)
    assert found[:90].sum() == 10 and found[90:].all()
    assert (found == cluster_balanced(labels, 20, 0.0, seed=3)).all()
    assert (found != cluster_balanced(labels, 20, 0.0, seed=4)).any()


def test_the_distance_to_a_reference():
    x, reference = unit(8, 20, 5), unit(9, 17, 5)
    expected = [1 - max(float(a.astype(np.float64) @ b) for b in reference) for a in x]
    assert np.allclose(diversity.distance_to(x, reference), expected, atol=1e-6)


def test_the_map_is_that_of_a_singular_value_decomposition():
    x = normalised(np.random.default_rng(2).standard_normal((40, 6)) * [5, 3, 1, 1, 1, 1])
    xy, shares = plane(x)
    centered = x - x.astype(np.float64).mean(0)
    left, values, _ = np.linalg.svd(centered, full_matrices=False)
    expected = left[:, :2] * values[:2]
    assert np.allclose(np.abs(xy), np.abs(expected), atol=1e-5)
    assert np.allclose(shares, values[:2] ** 2 / (values**2).sum())
    assert plane(x[:, :1])[0].shape == (40, 2)


WORDS = {
    "sea": ["ship", "sail", "wave", "storm", "anchor", "harbour", "captain", "deck", "tide", "mast"],
    "farm": ["plough", "field", "barn", "harvest", "cow", "wheat", "fence", "tractor", "hay", "orchard"],
    "law": ["court", "judge", "clause", "statute", "appeal", "witness", "verdict", "counsel", "bail", "writ"],
}


def prose(rng, subject, count=60):
    return " ".join(rng.choice(WORDS[subject], count))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents about three subjects, 30, 12 and 6; pairs that are nearly the same; and a reference about the second."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for subject, count in (("sea", 30), ("farm", 12), ("law", 6)):
        for i in range(count):
            (folder / f"{subject}{i:02d}.txt").write_text(prose(rng, subject))
    for i in range(4):
        words = (folder / f"sea{i:02d}.txt").read_text().split()
        (folder / f"twin{i:02d}.txt").write_text(" ".join([*words[:55], *rng.choice(WORDS["sea"], 5)]))
    (folder / "reference").mkdir()
    for i in range(5):
        (folder / "reference" / f"{i}.txt").write_text(prose(rng, "farm"))
    return folder


def config_of(folder, **values):
    sources = {
        name: CuratedSource(filters=(), source=SourceConfig("text", f"{folder}/{pattern}"))
        for name, pattern in (("a", "[ls]*.txt"), ("b", "[ft]*.txt"))
    }
    settings = {"embedding": EmbedConfig("hashed"), "clusters": 3, **values}
    return CurationConfig(sources, minhash=None, shard_bytes=3000, diversity=DiversityConfig(**settings))


def names(folder):
    rows = [json.loads(line) for path in sorted(folder.glob("[ab]/*.jsonl")) for line in path.read_text().splitlines()]
    return [row["name"].split("/")[-1].removesuffix(".txt") for row in rows]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_report_and_a_map_of_what_is_there(corpus, tmp_path):
    report = curate(config_of(corpus), tmp_path / "out")
    found = report["diversity"]
    assert (found["embedding"], found["documents"], found["kept"]) == ("hashed", 52, 52)
    assert found["vendi_before"] == found["vendi_after"] > 3
    assert sorted(row["documents"] for row in found["clusters"]) == [6, 12, 34]
    by_size = {row["documents"]: row for row in found["clusters"]}
    assert by_size[12]["sources"] == {"b": 12} and by_size[34]["sources"] == {"a": 30, "b": 4}
    for row in found["clusters"]:
        subjects = {next(name for name, words in WORDS.items() if sample["text"].split()[0] in words) for sample in row["samples"]}
        assert len(row["samples"]) == 3 and len(subjects) == 1
    with np.load(tmp_path / "out" / MAP) as drawn:
        assert drawn["xy"].shape == (52, 2) and drawn["kept"].all() and json.loads(drawn["names"].tobytes()) == ["a", "b"]
        assert np.bincount(drawn["cluster"]).tolist() == [row["documents"] for row in found["clusters"]]
        assert np.bincount(drawn["source"]).tolist() == [36, 16]
    assert found["map"]["method"] == "PCA" and 0 < sum(found["map"]["variance"]) <= 1


@pytest.mark.parametrize(
    ("step", "reason", "kept"),
    [
        ({"reference": ReferenceSettings(SourceConfig("text", "REF"), 12 / 52)}, "far_from_reference", 12),
        ({"semdedup": SemDeDupSettings(0.1)}, "semantic_duplicate", 48),
        ({"balance": BalanceSettings(0.35, 0.0)}, "cluster_full", 18),
        ({"k_center": KCenterSettings(0.25)}, "near_a_center", 13),
    ],
)
def test_each_step(corpus, tmp_path, step, reason, kept):
    if "reference" in step:
        step = {"reference": dataclasses.replace(step["reference"], source=SourceConfig("text", f"{corpus}/reference/*.txt"))}
    report = curate(config_of(corpus, **step), tmp_path / "out")
    left = names(tmp_path / "out")
    dropped = [of["dropped"]["diversity"] for of in report["sources"].values()]
    assert len(left) == report["diversity"]["kept"] == kept == 52 - sum(one["documents"] for one in dropped)
    assert set().union(*(one["reasons"] for one in dropped)) == {reason}
    if reason == "far_from_reference":
        assert all(name.startswith("farm") for name in left)
        assert report["diversity"]["reference"]["documents"] == 5
    if reason == "semantic_duplicate":
        pairs = [{f"sea{i:02d}", f"twin{i:02d}"} for i in range(4)]
        assert all(len(pair & set(left)) == 1 for pair in pairs)
        samples = [sample for one in dropped for sample in one["samples"]]
        assert all({sample["name"][-6:-4], sample["duplicate_of"][-6:-4]} <= {"00", "01", "02", "03"} for sample in samples)
    if reason == "cluster_full":
        assert sum(name.startswith("law") for name in left) == 6 and sum(name.startswith("farm") for name in left) == 6
    if reason != "far_from_reference":
        assert report["diversity"]["vendi_after"] > report["diversity"]["vendi_random"]


class Length:
    fingerprint = "length"

    def __call__(self, texts):
        return np.array([len(text) for text in texts], np.float32)


def all_steps(folder):
    config = config_of(
        folder,
        reference=ReferenceSettings(SourceConfig("text", f"{folder}/reference/*.txt"), 0.9, 3),
        semdedup=SemDeDupSettings(0.1, "random"),
        balance=BalanceSettings(0.8),
        k_center=KCenterSettings(0.5),
        vendi_order=2.0,
    )
    sources = {name: dataclasses.replace(one, keep={"length": KeepRule(top_share=0.9)}) for name, one in config.sources.items()}
    return dataclasses.replace(config, shard_bytes=9000, sources=sources, scores={"length": ScoreConfig("length")})


def test_stopped_after_any_shard_it_ends_with_the_same_bytes(corpus, tmp_path):
    config, seen, scorers = all_steps(corpus), [], {"length": lambda config: Length()}
    curate(config, tmp_path / "whole", scorers=scorers, report=seen.append)
    assert {one.done for one in seen} == {"judged", "scored by length", "embedded"}
    stopped = 0

    class Stopped(BaseException):
        pass

    def stop(progress):
        if progress.fresh_bytes:
            raise Stopped

    for _ in seen:
        with pytest.raises(Stopped):
            curate(config, tmp_path / "out", scorers=scorers, report=stop)
        stopped += 1
    curate(config, tmp_path / "out", workers=2, scorers=scorers)
    assert stopped == len(seen) and contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert 0 < len(names(tmp_path / "out")) < 30


def test_only_some_sources(corpus, tmp_path):
    report = curate(config_of(corpus, sources=("a",), k_center=KCenterSettings(0.5)), tmp_path / "out")
    assert report["diversity"]["documents"] == 36 and report["diversity"]["kept"] == 18
    assert report["sources"]["b"]["kept"]["documents"] == 16


def test_documents_without_a_vector_go(corpus, tmp_path):
    paths = sorted(str(path) for path in corpus.glob("*.txt"))
    np.savez(tmp_path / "v.npz", names=np.array(paths[:-1]), vectors=unit(0, len(paths) - 1, 4))
    report = curate(config_of(corpus, embedding=EmbedConfig(path=f"{tmp_path}/v.npz")), tmp_path / "out")
    assert report["sources"]["b"]["dropped"]["diversity"]["reasons"] == {"no_vector": 1}

    class Hidden:
        kind, fingerprint = "hidden", "h"

        def __call__(self, texts, names=()):
            if any("verdict" in text for text in texts):
                raise RuntimeError("no verdict")
            return normalised(np.array([[len(text), 1] for text in texts]))

    report = curate(
        config_of(corpus, embedding=EmbedConfig(model="m")), tmp_path / "x", embedders={"hidden": lambda config: Hidden()}
    )
    assert report["sources"]["a"]["dropped"]["diversity"]["reasons"] == {"embedding_RuntimeError": 6}
    assert report["sources"]["a"]["dropped"]["diversity"]["samples"][0]["error"] == "RuntimeError: no verdict"


def test_a_corpus_of_which_nothing_is_left(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    source = CuratedSource(filters=(), source=SourceConfig("text", f"{tmp_path}/a.txt"))
    config = CurationConfig({"a": source}, diversity=DiversityConfig(EmbedConfig("hashed"), k_center=KCenterSettings(0.5)))
    found = curate(config, tmp_path / "out")["diversity"]
    assert found["documents"] == 0 and found["vendi_after"] == 0 and found["clusters"] == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": ("bok",)}, "config.diversity.sources='bok' is unknown; did you mean 'books'"),
        ({"clusters": 0}, "diversity.clusters=0 must be above 0"),
        ({"semdedup": {"epsilon": 0.0}}, "diversity.semdedup.epsilon=0.0 must be above 0"),
        ({"semdedup": {"keep": "hardest"}}, "did you mean 'hard'"),
        ({"balance": {"share": 1.2}}, "diversity.balance.share=1.2 must be above 0 and at most 1"),
        ({"balance": {"tau": -1.0}}, "diversity.balance.tau=-1.0 must not be negative"),
        ({"k_center": {"share": 0.0}}, "diversity.k_center.share=0.0 must be above 0"),
        ({"reference": {"share": 0.0}}, "diversity.reference.share=0.0 must be above 0"),
        ({"embedding": {"kind": "static"}}, "needs embedding.path"),
    ],
)
def test_wrong_configs(values, message):
    with pytest.raises(UserError, match=message):
        build(CurationConfig, {"sources": {"books": {}}, "diversity": values})


def test_a_reference_that_is_not_there(corpus, tmp_path):
    config = config_of(corpus, reference=ReferenceSettings(SourceConfig("text", f"{tmp_path}/no*.txt")))
    with pytest.raises(UserError, match="matches no file"):
        curate(config, tmp_path / "out")
