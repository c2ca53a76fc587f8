"""What is looked for is found, and is the best of what there is."""

import pytest

from lcx.core.errors import UserError
from lcx.planning import search
from lcx.planning.plan import stage_plan
from lcx.planning.topology import topology
from tests.planning.cases import run

V5P = topology("v5p:2x2x2")


def test_the_longest_rows_fit_and_longer_ones_do_not():
    best, over = search.find("context", run(1 << 17), 0, V5P)
    assert best.plan.fits and not over.plan.fits
    assert over.plan.stage.seq_len - best.plan.stage.seq_len == search.STEP
    assert 1 << 20 < best.plan.stage.seq_len < 1 << 21
    # What the compiler adds to the arithmetic makes them shorter.
    assert search.find("context", run(1 << 17), 0, V5P, 1.2)[0].plan.stage.seq_len < best.plan.stage.seq_len


def test_a_model_that_is_too_large_is_answered():
    with pytest.raises(UserError, match=r"not even rows of 65,536 tokens fit v5e:2x2, which need .* GB of 16.9; try"):
        search.find("context", run(1 << 17), 0, topology("v5e:2x2"))


def test_the_fewest_chips_fit_and_fewer_do_not():
    found = search.find("chips", run(1 << 20), 0, topology("v5p:4x4x4"))
    assert found[0].plan.fits and not any(one.plan.fits for one in found[1:])
    assert found[0].plan.where.chips == 8 and max(one.plan.where.chips for one in found) == 8


def test_the_fastest_mesh_and_strategy_come_first():
    for wanted in ("mesh", "strategy", "remat"):
        found = search.find(wanted, run(1 << 19), 0, V5P)
        fitting = [one.plan.time.seconds for one in found if one.plan.fits]
        assert fitting == sorted(fitting) and found[0].plan.fits
        assert len({one.what for one in found}) == len(found) > 2


def test_meshes_reach_over_slices_as_the_stage_does():
    two = topology("v5p:2x2x1", 2)
    for over, widest in ((False, 4), (True, 8)):
        found = search.find("mesh", run(1 << 17, batch_size=8, mesh={"context_over_slices": over}), 0, two)
        assert max(one.plan.mesh["ring"] * one.plan.mesh["ulysses"] for one in found) == widest


def test_strategies_are_those_that_divide():
    found = search.find("strategy", run(1 << 19, mesh={"ulysses": 2}), 0, V5P)
    splits = {(one.plan.mesh["ring"], one.plan.mesh["ulysses"], one.plan.work.strategy) for one in found}
    assert {(8, 1, "ring"), (8, 1, "gather"), (2, 4, "ring")} <= splits and any(ulysses == 8 for _, ulysses, _ in splits)


def test_advice_fits_and_names_the_least_slow_first():
    config = run(5 << 18, execution={"remat": "attention"})
    plan = stage_plan(config, 0, V5P)
    assert not plan.fits
    ways = search.advice(config, 0, plan)
    assert ways and all(one.plan.fits for one in ways)
    here = [one.plan.time.seconds for one in ways if one.plan.where.chips == 8]
    assert here == sorted(here) and "execution.remat=block" in [one.what for one in ways]
    assert ways[-1].plan.where.chips > 8
