"""Rows dealt by their documents: what the solver guarantees, and that its counts are those of the masks."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lcx.attention.parallel.balance import choose_balanced, of_layout, of_pieces
from lcx.attention.parallel.dealing import deal, nested_rings, part_sizes, parts_needed
from lcx.attention.parallel.documents import Documents, pair_counts
from lcx.attention.parallel.nested import parts_of
from lcx.attention.parallel.sequence_layout import arrange
from lcx.core.batch import PADDING, SHARED, Index
from lcx.core.mask import Mask, visible
from tests.quick import mostly_slow

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MIXED = ((None, 0.25), (1024, 0.75))


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import balance

    yield balance
    for name in ("balance", "tables"):
        sys.modules.pop(name, None)


def documents(*lengths, segments=None):
    return Documents(np.asarray(lengths), np.asarray(segments or range(1, len(lengths) + 1)))


def drawn(tokens, mean, seed=0):
    """A row of documents of any length up to twice the mean."""
    rng, lengths = np.random.default_rng(seed), []
    while left := tokens - sum(lengths):
        lengths.append(min(left, int(rng.integers(1, 2 * mean))))
    return documents(*lengths)


def pairs_by_hand(row, columns, n, window=None):
    """Pairs of the queries of each device with the keys of each device, `[n, n]`, from the mask itself."""
    length = len(columns)
    segments = np.repeat(row.segments, row.lengths)
    index = Index(*(jnp.asarray(x[None, columns], jnp.int32) for x in (np.arange(length), np.arange(length), segments)))
    seen = np.asarray(visible(Mask(window=window), index, index))[0]
    return seen.reshape(n, length // n, n, length // n).sum(axis=(1, 3))


@pytest.mark.parametrize("n", [8, 64])
@pytest.mark.parametrize("kind", ["ProLong", "books and code", "uniform", "uniform, 66 a row"])
def test_rows_of_64_documents_are_balanced_and_send_less_than_a_ring(benchmark, kind, n):
    """The largest work of a device is within 5% of the mean, waiting at every exchange within 15%, and no more is sent."""
    for row in benchmark.rows(kind, n * 16_384, count=2):
        pieces = deal(row, n)
        assert sorted(pieces.columns) == list(range(n * 16_384))
        assert np.bincount(pieces.device, pieces.length).tolist() == [16_384] * n
        found = of_pieces(row, pieces, n)
        assert found.work.sum() == pytest.approx(row.work().sum())
        assert found.busiest <= 1.05 and found.longest <= 1.15 and found.sent <= n - 1
        zigzag = of_layout(row, "zigzag", n)
        assert zigzag.longest > 1.2 and found.longest < zigzag.longest and zigzag.sent == n - 1


@pytest.mark.parametrize("windows", [MIXED, ((1024, 1.0),)], ids=["mixed", "local"])
def test_windows_are_balanced_too(benchmark, windows):
    for row in benchmark.rows("ProLong", 8 * 16_384, count=2):
        found = of_pieces(row, deal(row, 8, windows), 8, windows)
        assert found.busiest <= 1.05 and found.longest <= 1.15 and found.sent <= 7


@pytest.mark.parametrize("n", [1, 2, 3, 6, 8, 12])
@pytest.mark.parametrize("mean", [3, 40])
def test_keys_reach_all_devices_that_need_them(n, mean):
    """All devices of a document are in one ring of the size that each of its pieces names, or it is on one alone."""
    row = drawn(240, mean)
    pieces = deal(row, n)
    assert sorted(pieces.columns) == list(range(240))
    assert set(np.bincount(pieces.device, pieces.length, n)) == {240 / n}
    assert set(pieces.reach) <= {1, *nested_rings(n)}
    for document in range(len(row.lengths)):
        own = pieces.document == document
        assert np.unique(pieces.device[own][:, None] // pieces.reach[own], axis=0).shape[0] == 1
    again = deal(row, n)
    assert (again.columns == pieces.columns).all()


def test_padding_travels_nowhere_and_what_all_see_everywhere():
    row = documents(1, 30, 100, 61, segments=[SHARED, 1, 2, PADDING])
    pieces = deal(row, 8)
    assert set(pieces.reach[pieces.document == 0]) == {8} and set(pieces.reach[pieces.document == 3]) == {1}
    assert of_pieces(row, pieces, 8).work.sum() == 1 + 30 * 31 / 2 + 100 * 101 / 2


def test_a_single_document_is_as_even_as_zigzag():
    row = documents(8 * 1024)
    found = of_pieces(row, deal(row, 8), 8)
    assert found.busiest <= 1.01 and found.longest <= 1.15 and found.sent <= 7
    assert of_layout(row, "zigzag", 8).longest <= 1.01


@pytest.mark.parametrize("window", [None, 1, 7, 200])
def test_pairs_are_those_of_the_mask(window):
    row, n = Documents.of(np.repeat([1, 2, 3, PADDING], [50, 3, 31, 12])), 4
    pieces = deal(row, n)
    found = pair_counts(row, pieces, pieces.device, n, n, ((window, 1.0),))
    assert (found == pairs_by_hand(row, pieces.columns, n, window)).all()
    work = row.work(((window, 1.0),))
    assert found.sum() == work.sum()
    for layout in ("contiguous", "zigzag", "striped"):
        found = of_layout(row, layout, n, ((window, 1.0),))
        wanted = pairs_by_hand(row, arrange(np.arange(96)[None], layout, n)[0], n, window)
        assert found.work.tolist() == wanted.sum(axis=1).tolist()
        if len(found.steps) == n:  # all devices are neighbours that the window reaches
            assert [step.work.tolist() for step in found.steps] == [[wanted[i, i - hop] for i in range(n)] for hop in range(n)]


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_a_program_counts_the_parts_that_the_solver_counts(n):
    rows = [deal(drawn(24 * n, mean, seed), n) for seed, mean in enumerate((3, 9, 30))]
    reach = jnp.asarray(np.stack([np.repeat(row.reach, row.length) for row in rows]), jnp.int32)
    wanted = np.max([parts_needed(row, n) for row in rows], axis=0)
    assert [int(count) for count in parts_of(reach, n)] == wanted.tolist()


def test_rings_are_nested_and_parts_come_together_as_what_a_device_has():
    assert [nested_rings(n) for n in (1, 2, 6, 8, 12, 64)] == [(), (2,), (3, 6), (4, 8), (4, 12), (8, 64)]
    assert part_sizes(16_384, 64) == (2048, 256)
    assert part_sizes(6, 8) == (2, 1)  # filled up to 8


def test_time_is_that_of_the_slowest_of_those_who_wait_for_each_other():
    row = documents(96, 4, 4, 4, 4, 4, 4, 8)
    plain = of_layout(row, "contiguous", 4)
    assert plain.longest == pytest.approx(sum(step.work.max() for step in plain.steps) / plain.work.mean())
    assert plain.time(1e6) == pytest.approx(3e6 + plain.steps[-1].work.max())  # three transfers, each longer than any work


def test_layers_with_windows_alone_are_compared_with_their_neighbours():
    row, windows = documents(8192, *[8] * 1024), ((64, 1.0),)
    near = of_layout(row, "contiguous", 64, windows)
    assert near.sent == 1 and near.work.sum() == pytest.approx(row.work(windows).sum())
    assert choose_balanced([row], "contiguous", 64, windows)[0] == "balanced"
    assert choose_balanced([row], "contiguous", 64, windows, transfer=256 * 1500)[0] == "contiguous"


def test_layout_is_chosen_by_documents_and_says_why():
    alone = choose_balanced([documents(4096)], "zigzag", 8)
    assert alone[0] == "zigzag" and alone[1].startswith("zigzag: attention over the documents of 1 rows takes 8 devices")
    layout, why = choose_balanced([drawn(4096, 200), drawn(4096, 300, seed=1)], "zigzag", 8)
    assert layout == "balanced" and "times as long as even work with zigzag" in why


def test_a_document_in_two_places_is_refused():
    with pytest.raises(ValueError, match="a document of the row is in several places"):
        Documents.of(np.asarray([1, 1, 2, 1]))
    with pytest.raises(ValueError, match="100 tokens cannot be dealt to 8 devices"):
        deal(documents(100), 8)


@pytest.mark.parametrize("n", mostly_slow([8, 64], [8]))
def test_any_row_is_dealt(n):
    """Lengths of every kind, whole rows of padding, and documents as long as the row."""
    for seed in range(4):
        for mean in (1.0, 20, 500, 5000):
            row = drawn(64 * n, max(2, int(mean)), seed)
            assert sorted(deal(row, n).columns) == list(range(64 * n))
    for row in (documents(64 * n), documents(64 * n, segments=[PADDING]), documents(*[n] * 64), documents(1, 64 * n - 1)):
        assert sorted(deal(row, n).columns) == list(range(64 * n))
