"""Weights that change within a stage: shares over any window, rows that depend on the step alone, and what does not fit."""

import dataclasses

import jax
import numpy as np
import pytest

from lcx.core.configs import build
from lcx.core.errors import UserError
from lcx.data import mixture, schedule
from lcx.data.config import DataConfig
from lcx.data.loader import Corpus, Loader
from lcx.data.schedule import Schedule

STEPS, ROWS = 60, 7
CONSTANT = {"a": 0.5, "b": 0.3, "c": 0.2}
KNOTS = {"a": ((0.0, 0.9), (1.0, 0.3)), "b": ((0.0, 0.0), (0.5, 0.4), (0.5, 1.5), (1.0, 0.1))}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Three parts, each in a letter of its own."""
    folder, rng = tmp_path_factory.mktemp("letters"), np.random.default_rng(0)
    for letter in CONSTANT:
        for i in range(12):
            (folder / f"{letter}{i}.txt").write_text(letter * int(rng.integers(200, 3000)) + f"{i}")
    parts = {
        letter: {"weight": weight, "source": {"kind": "text", "path": f"{folder}/{letter}*.txt"}}
        for letter, weight in CONSTANT.items()
    }
    return build(DataConfig, {"parts": parts})


@pytest.fixture(scope="module")
def corpus(config):
    return Corpus(config)


@pytest.fixture
def loader(config, corpus):
    return Loader(config, 64, ROWS, seed=1, corpus=corpus, schedule=Schedule(STEPS, KNOTS))


def equal(one, two):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))


def shares(rows):
    """The shares that the knots above mean in the middle of each row, worked out row by row."""
    found = np.empty((rows, 3))
    for row in range(rows):
        x = (row + 0.5) / rows
        a = 0.9 - 0.6 * x
        b = 0.8 * x if x < 0.5 else 1.5 - 2.8 * (x - 0.5)
        found[row] = np.array([a, b, 0.2]) / (a + b + 0.2)
    return found


def test_shares_of_every_window_follow_the_weights(loader):
    part = np.concatenate([loader.addresses(step)[0] for step in range(STEPS)])
    error = np.cumsum(np.eye(3)[part] - shares(STEPS * ROWS), axis=0)
    assert np.abs(error).max() < 1
    # A window is the difference of two beginnings.
    windows = np.concatenate([error[length:] - error[:-length] for length in (ROWS, 10 * ROWS)])
    assert np.abs(windows).max() < 2


def test_the_rows_of_a_part_are_those_that_its_letters_say(loader):
    batch = loader.batch(31)
    letters = [next(letter for letter in "abc" if ord(letter) in row) for row in batch.tokens.tolist()]
    assert [loader.names[part] for part in batch.row_parts] == letters
    assert batch.num_parts == 3


def test_a_part_takes_its_rows_in_the_order_of_constant_weights(config, corpus, loader):
    alone = Loader(dataclasses.replace(config, parts={"b": config.parts["b"]}), 64, 1, seed=1, corpus=corpus)
    part, row = (np.concatenate(x) for x in zip(*(loader.addresses(step) for step in range(STEPS)), strict=True))
    own = row[part == 1].tolist()
    assert own == [int(alone.addresses(i)[1][0]) for i in range(len(own))]


def test_a_batch_is_the_same_however_it_is_reached(config, corpus, loader):
    walked = [loader.batch(step) for step in range(STEPS)]
    fresh = Loader(config, 64, ROWS, seed=1, corpus=corpus, schedule=Schedule(STEPS, KNOTS))
    for step in (STEPS - 1, 0, 33):
        assert equal(fresh.batch(step), walked[step])
    hosts = [fresh.batch(17, slice(i, i + 1)) for i in range(ROWS)]
    assert equal(jax.tree.map(lambda *x: np.concatenate(x), *hosts), walked[17])
    # Rows do not know of batches: the same stage in steps of one row.
    single = Loader(config, 64, 1, seed=1, corpus=corpus, schedule=Schedule(STEPS * ROWS, KNOTS))
    assert equal(single.batch(5 * ROWS + 2), fresh.batch(5, slice(2, 3)))


def test_a_part_has_no_rows_while_its_weight_is_zero(config, corpus):
    knots = {"b": ((0.0, 0.0), (0.5, 0.0), (1.0, 1.0))}
    loader = Loader(config, 64, ROWS, seed=1, corpus=corpus, schedule=Schedule(STEPS, knots))
    found = [(loader.addresses(step)[0] == 1).sum() for step in range(STEPS)]
    assert sum(found[: STEPS // 2]) == 0 and found[-1] >= 3


def test_repeats_are_those_of_the_rows_that_come(loader):
    part = np.concatenate([loader.addresses(step)[0] for step in range(STEPS)])
    for times, names in loader.repeats(STEPS).values():
        (index,) = (loader.names.index(name) for name in names)
        assert times == pytest.approx((part == index).sum() / loader.parts[index].size, abs=1 / loader.parts[index].size)


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_any_shares_are_met_to_less_than_a_row(parts):
    """Tijdeman's bound, 1 - 1 / (2P - 2), for shares that jump about."""
    rng = np.random.default_rng(parts)
    for power in (0.3, 1, 4):
        shares = rng.random((800, parts)) ** power * (rng.random((800, parts)) < 0.8) + 1e-3
        shares /= shares.sum(axis=1, keepdims=True)
        error = np.cumsum(np.eye(parts)[mixture.interleave(shares)] - shares, axis=0)
        assert np.abs(error).max() <= (1 - 1 / (2 * parts - 2) if parts > 1 else 0) + 1e-9


def test_equal_shares_take_turns():
    """Shares at which every comparison is a tie."""
    for parts in (2, 4, 5, 8):
        chosen = mixture.interleave(np.full((10 * parts, parts), 1 / parts))
        assert all(sorted(chosen[i : i + parts]) == list(range(parts)) for i in range(0, 10 * parts, parts))


def test_places_in_tokens_are_shares_of_the_stage():
    assert schedule.over_stage("x", ((0.0, 1.0), (250.0, 3.0), (1000.0, 0.0)), 1000) == ((0.0, 1.0), (0.25, 3.0), (1.0, 0.0))
    # Made for a longer stage: cut at the end of this one.
    assert schedule.over_stage("x", ((0.0, 1.0), (2000.0, 5.0)), 1000) == ((0.0, 1.0), (1.0, 3.0))
    jump = ((0.0, 1.0), (500.0, 2.0), (500.0, 4.0), (1000.0, 4.0), (1000.0, 9.0))
    assert schedule.over_stage("x", jump, 1000) == ((0.0, 1.0), (0.5, 2.0), (0.5, 4.0), (1.0, 4.0))


def test_the_mean_is_the_area_below():
    assert schedule.mean(((0.0, 0.9), (1.0, 0.3))) == pytest.approx(0.6)
    assert schedule.mean(KNOTS["b"]) == pytest.approx(0.5 * 0.2 + 0.5 * 0.8)
    assert schedule.mean(((0.0, 0.1), (0.3, 0.1), (1.0, 0.1))) == 0.1


@pytest.mark.parametrize(
    ("knots", "message"),
    [
        (((0.0, 1.0),), "too few knots"),
        (((0.0, 1.0), (1.0, -0.5)), "not negative"),
        (((0.0, 1.0), (1.0, float("nan"))), "finite"),
        (((0.0, 1.0), (0.8, 1.0), (0.5, 1.0), (1.0, 1.0)), "not sorted"),
        (((0.1, 1.0), (1.0, 1.0)), "covers 0.1 to 1; its places must go from 0 to 1"),
        (((0.0, 1.0), (0.5, 1.0)), "covers 0 to 0.5"),
        (((0.0, 1.0), (999.0, 1.0)), "to its 1,000 tokens"),
    ],
)
def test_knots_that_do_not_fit(knots, message):
    with pytest.raises(UserError, match=message):
        schedule.over_stage("stages.x.mixture.a", knots, 1000)


def test_some_part_must_have_a_weight(config, corpus):
    off = {name: ((0.0, 1.0), (0.5, 0.0), (1.0, 0.0)) for name in CONSTANT}
    with pytest.raises(UserError, match=r"all parts \(a, b, c\) have weight 0 at step 30"):
        Loader(config, 64, ROWS, seed=1, corpus=corpus, schedule=Schedule(STEPS, off))


def test_there_are_no_rows_beyond_the_stage(loader):
    with pytest.raises(ValueError, match="beyond the 60 steps"):
        loader.batch(STEPS)
