"""The time that a run will take: exact by its own steps, near by a measurement, and said in a sentence."""

import dataclasses

import jax
import pytest
import tiny

from lcx.core.mesh import MeshConfig, make_mesh
from lcx.core.numbers import duration
from lcx.model.config import ModelConfig
from lcx.model.flops import step_flops
from lcx.training import forecast
from lcx.training.builder import StageBuilder
from lcx.training.loop import train
from lcx.training.stages import run_config

MODEL = ModelConfig(vocab_size=49152, model_dim=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, mlp_dim=1536)


def one():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def row(index, speed):
    return {"stage_index": index, "tokens_per_second": speed}


def test_a_stage_that_has_begun_takes_what_it_took():
    rows = [row(0, 1.0), *[row(1, speed) for speed in (3.0, 100.0, 50.0)]]
    assert forecast.own_seconds(rows, 1, 200) == 4.0
    assert forecast.own_seconds(rows, 0, 200) is None and forecast.own_seconds([], 0, 200) is None


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "0 s"), (59, "59 s"), (90, "2 min"), (7800, "2 h 10 min"), (100 * 60, "1 h 40 min")]
)
def test_times_as_people_say_them(seconds, said):
    assert duration(seconds) == said


def builder(**changes):
    return StageBuilder(run_config(tiny.config(**changes)), [], jax.devices()[:1])


def test_the_sentence():
    rows = [row(index, tokens / 600) for index, tokens in ((0, 512), (1, 512)) for _ in range(3)]
    said = forecast.forecast(builder(), 0, 5, rows, "--config.stages.STAGE.steps")
    assert said == (
        "the steps take about 2 h 10 min more on this machine (base: 30 min, longer: 1 h 40 min), without compilation and "
        "evaluations; for less, lower --config.stages.STAGE.steps"
    )
    assert forecast.forecast(builder(), 1, 9, rows, "x").startswith(
        "the steps take about 10 min more on this machine (longer: 10 min)"
    )
    assert forecast.forecast(builder(), 0, 0, [], "x") == "the steps take less than a minute, without compilation and evaluations"


def test_it_is_said_before_the_first_step_and_only_where_steps_are_left(tmp_path, capsys):
    run = run_config(tiny.config())
    for said in (True, False):
        train(run, tmp_path, jax.devices()[:1], fewer="--config.steps")
        out = capsys.readouterr().out
        assert ("the steps take" in out) == said
        if said:
            assert out.index("the steps take") < out.index("base 8/8")


@pytest.mark.parametrize(
    ("shapes", "wanted"),
    [
        ([(64, 64), (2, 512)], 2),  # as they are
        ([(1, 2048)], 1),
        ([(16, 131072)], 2),  # two short ones tell of the long one
    ],
)
def test_what_is_measured_is_short(shapes, wanted):
    period = dataclasses.replace(MODEL, num_layers=1, vocab_size=1)
    found = forecast.probe_shapes(period, shapes, one())
    assert len(found) == wanted
    for rows, length in found:
        assert step_flops(period, rows, length) <= 2 * forecast.PROBE_CPU
    assert [length for _, length in found] == sorted(length for _, length in found)


def test_a_sample_is_a_period_of_layers():
    assert forecast.sample_config(MODEL, "none").num_layers == 1
    assert forecast.sample_config(MODEL, "attention").num_layers == 2  # a loop, so that what is recomputed takes its time
    mixed = ModelConfig(pattern=("local", "local", "global"), window=10, num_layers=4)
    assert [forecast.sample_config(mixed, remat).num_layers for remat in ("none", "block")] == [3, 4]


def test_shapes_fit_the_mesh(devices):
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, context=4), devices)
    for rows, length in forecast.probe_shapes(MODEL, [(6, 24576)], mesh):
        assert rows % 2 == 0 and length % 8 == 0 and length < 24576


def test_keys_that_a_token_sees():
    assert forecast.seen(MODEL, 100) == 50.5
    mixed = ModelConfig(pattern=("local", "global"), window=10)
    assert forecast.seen(mixed, 1000) == pytest.approx((500.5 + 10) / 2, rel=0.01)
    assert forecast.seen(MODEL, 1000, group=250) == pytest.approx(250, rel=0.15)


def test_the_line_through_two_measurements():
    assert forecast.at_keys([(10, 1.0)], 500) == 1.0
    assert forecast.at_keys([(10, 1.0), (20, 2.0)], 40) == pytest.approx(4.0)
    assert forecast.at_keys([(10, 2.0), (20, 1.0)], 40) == 1.5  # noise
    assert forecast.at_keys([(100, 1.0), (200, 3.0)], 10) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mesh": {"data": 2, "fsdp": 1, "context": 2}},
        pytest.param({"lora": {"rank": 2}, "init_from": "somewhere"}, marks=pytest.mark.slow),
        pytest.param({"optim": {"name": "muon"}, "stages": tiny.stages(shifted_group=32)}, marks=pytest.mark.slow),
    ],
    ids=["plain", "mesh", "lora", "muon"],
)
def test_every_kind_of_step_is_measured(changes, devices):
    run = run_config(tiny.config(**changes))
    given = StageBuilder(run, [], devices[:4] if "mesh" in changes else devices[:1])
    found = forecast.step_seconds([given.build(0), given.build(1)], given)
    assert set(found) == {0, 1} and all(0 < seconds < 10 for seconds in found.values())
