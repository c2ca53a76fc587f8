"""Packing against a reference that walks over the tokens one by one."""

import itertools
import time

import numpy as np
import pytest

from lcx.core.batch import PADDING, SHARED, Index
from lcx.core.errors import UserError
from lcx.core.mask import Mask, visible
from lcx.data.config import PackingConfig
from lcx.data.packing import assemble, plan
from lcx.data.sources.sources import InMemorySource, Subset

METHODS = ("concat_then_split", "first_fit", "best_fit")
BOS = 999


def corpus(lengths):
    """Documents whose tokens are all different, so that each token tells where it comes from."""
    bounds = np.cumsum([0, *lengths])
    tokens = [np.arange(a, b) for a, b in itertools.pairwise(bounds)]
    return Subset(InMemorySource([f"d{i}" for i in range(len(lengths))], tokens, [0] * len(lengths), 1000), np.arange(len(lengths)))


def slow_first_fit(sizes, capacity):
    room, rows = [], []
    for size in sizes:
        row = next((i for i, free in enumerate(room) if free >= size), len(room))
        room[row:] = room[row:] or [capacity]
        room[row] -= size
        rows.append(row)
    return rows


def slow_best_fit(sizes, capacity):
    room, rows = [], []
    for size in sizes:
        fits = [(free, i) for i, free in enumerate(room) if free >= size]
        row = min(fits)[1] if fits else len(room)
        room[row:] = room[row:] or [capacity]
        room[row] -= size
        rows.append(row)
    return rows


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(6))
def test_every_token_once_and_no_row_too_full(method, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, rng.integers(1, 60))
    capacity = int(rng.integers(1, 25))
    made = plan(method, lengths, capacity, np.random.default_rng(seed))
    seen = [np.zeros(n, int) for n in lengths]
    for row in range(len(made)):
        spans = made.spans(row)
        assert spans
        assert sum(end - start for _, start, end in spans) <= capacity
        for document, start, end in spans:
            assert 0 <= start < end <= lengths[document]
            seen[document][start:end] += 1
    assert all((count == 1).all() for count in seen)
    again = plan(method, lengths, capacity, np.random.default_rng(seed))
    assert all(made.spans(i) == again.spans(i) for i in range(len(made)))


@pytest.mark.parametrize("seed", range(5))
def test_concat_is_the_shuffled_stream_cut_in_equal_parts(seed):
    lengths = np.random.default_rng(seed).integers(1, 30, 20)
    made = plan("concat_then_split", lengths, 7, np.random.default_rng(seed))
    order = np.random.default_rng(seed).permutation(20)
    stream = [(d, i) for d in order.tolist() for i in range(lengths[d])]
    rows = [[(d, i) for d, a, b in made.spans(row) for i in range(a, b)] for row in range(len(made))]
    assert rows == [stream[i : i + 7] for i in range(0, len(stream), 7)]


@pytest.mark.parametrize(("method", "slow"), [("first_fit", slow_first_fit), ("best_fit", slow_best_fit)])
@pytest.mark.parametrize("seed", range(5))
def test_fitting_methods_against_a_search_over_all_rows(method, slow, seed):
    rng = np.random.default_rng(seed)
    lengths, capacity = rng.integers(1, 30, 50), int(rng.integers(5, 40))
    made = plan(method, lengths, capacity, np.random.default_rng(seed))
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    pieces = [(d, a, min(a + capacity, lengths[d])) for d in order for a in range(0, lengths[d], capacity)]
    if method == "best_fit":
        pieces.sort(key=lambda piece: piece[1] - piece[2])
    rows = slow([b - a for _, a, b in pieces], capacity)
    expected = [[piece for piece, row in zip(pieces, rows, strict=True) if row == i] for i in range(max(rows) + 1)]
    assert [made.spans(i) for i in range(len(made))] == expected


def reference(made, rows, source, seq_len, config):
    """The rules of the module's docstring, token by token."""
    out = []
    for row in rows:
        line = [dict(token=BOS, segment=SHARED, position=0, weight=0, end=False)] if config.shared_bos else []
        for number, (document, start, end) in enumerate(made.spans(row)):
            for i in range(start, end):
                token = int(source.cumulative[document]) + i
                last = i + 1 == source.lengths[document]
                line.append(
                    dict(
                        token=token,
                        segment=number + 1 if config.mask_documents else 1,
                        position=i - start + config.shared_bos if config.reset_positions else len(line),
                        weight=1 if not last else 0,
                        target=token + 1 if not last else 0,
                        end=last,
                    )
                )
        for here, after in itertools.pairwise(line):
            if here["end"] and not config.mask_documents:
                here.update(target=after["token"], weight=1)
        if config.shared_bos:
            line[0]["target"] = line[1]["token"]
        while len(line) < seq_len:
            line.append(dict(token=0, segment=PADDING, position=None, weight=0, target=0))
        out.append(line)
    return out


COMBINATIONS = list(itertools.product(METHODS, (False, True), (False, True), (False, True)))


@pytest.mark.parametrize(("method", "masked", "reset", "anchor"), COMBINATIONS)
def test_rows_of_every_combination(method, masked, reset, anchor):
    config = PackingConfig(method, masked, reset, anchor)
    rng = np.random.default_rng(1)
    source, seq_len = corpus(rng.integers(1, 26, 25).tolist()), 17
    made = plan(method, source.lengths, seq_len - anchor, rng)
    rows = rng.permutation(len(made))
    arrays = assemble(made, rows, source, seq_len, config, BOS)
    assert {key: value.dtype.name for key, value in arrays.items()} == dict.fromkeys(arrays, "int32") | {"loss_weights": "float32"}
    for r, line in enumerate(reference(made, rows, source, seq_len, config)):
        for t, wanted in enumerate(line):
            found = {key: arrays[key][r, t] for key in arrays}
            assert found["tokens"] == wanted["token"]
            assert found["segments"] == wanted["segment"]
            assert found["loss_weights"] == wanted["weight"]
            assert found["targets"] == wanted["target"]
            if wanted["position"] is not None:
                assert found["positions"] == wanted["position"]


@pytest.mark.parametrize(("method", "masked", "reset", "anchor"), COMBINATIONS)
def test_who_sees_whom(method, masked, reset, anchor):
    """Under core's mask: never the future; never another document when masked; the anchor always; padding never."""
    config = PackingConfig(method, masked, reset, anchor)
    rng = np.random.default_rng(2)
    source, seq_len = corpus(rng.integers(1, 20, 12).tolist()), 16
    made = plan(method, source.lengths, seq_len - anchor, rng)
    arrays = assemble(made, np.arange(len(made)), source, seq_len, config, BOS)
    order = np.broadcast_to(np.arange(seq_len, dtype=np.int32), arrays["tokens"].shape)
    index = Index(order, arrays["positions"], arrays["segments"])
    seen = np.asarray(visible(Mask(), index, index))
    document = np.searchsorted(source.cumulative, arrays["tokens"], "right")
    real, shared = arrays["segments"] != PADDING, arrays["segments"] == SHARED
    same = document[:, :, None] == document[:, None, :] if masked else np.ones_like(seen)
    allowed = (same & ~shared[:, :, None] & ~shared[:, None, :]) | shared[:, None, :]
    past = order[:, :, None] >= order[:, None, :]
    np.testing.assert_array_equal(seen, allowed & past & real[:, :, None] & real[:, None, :])


def test_a_hundred_thousand_documents_in_seconds():
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(6, 1.5, 100_000)).astype(np.int64)
    begun = time.thread_time()
    plans = [plan(method, lengths, 4096, np.random.default_rng(1)) for method in METHODS]
    assert time.thread_time() - begun < 10
    concat, first, best = (made.fill_ratio(4096) for made in plans)
    assert concat > 0.9999
    assert best >= first > 0.99


def test_wrong_inputs():
    source = corpus([3])
    made = plan("concat_then_split", source.lengths, 3, np.random.default_rng(0))
    with pytest.raises(UserError, match=r"bytes\+bos"):
        assemble(made, np.arange(1), source, 4, PackingConfig(shared_bos=True), None)
    with pytest.raises(UserError, match="longer seq_len"):
        plan("first_fit", source.lengths, 0, np.random.default_rng(0))
