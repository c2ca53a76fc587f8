"""The time that a run will take: exact by its own steps, near by a measurement, and said in a sentence."""

from typing import get_args, get_type_hints

import jax
import pytest
import tiny

from lcx.core import host
from lcx.core.numbers import duration
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.model.flops import step_flops
from lcx.training import forecast, sample
from lcx.training.builder import StageBuilder
from lcx.training.loop import train
from lcx.training.sample import Sample
from lcx.training.stages import run_config


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


SIZES = tiny.config()["model"]


def sampled(devices=1, model=None, **stage):
    """The sample of a run with a stage of `stage`'s sizes; nothing is run."""
    stages = [{"name": "only", "steps": 1, "batch_size": 4, **stage}]
    run = run_config(tiny.config(model={**SIZES, **(model or {})}, stages=stages, mesh={"data": -1, "fsdp": 1}))
    return Sample(run, StageBuilder(run, [], jax.devices()[:devices]).build(0))


@pytest.mark.parametrize(
    ("stage", "devices", "shape"),
    [
        ({"seq_len": 64}, 1, (4, 64)),  # as it is
        ({"seq_len": 2048}, 1, (1, 512)),  # one row, and shorter
        ({"seq_len": 2048, "accumulate": 2}, 2, (2, 256)),  # a row for each device
    ],
)
def test_what_is_measured_is_short(stage, devices, shape, monkeypatch):
    layer = ModelConfig(**{**SIZES, "num_layers": 1, "vocab_size": 1})
    monkeypatch.setattr(sample, "PASS_CPU", step_flops(layer, 1, 512))
    found = sampled(devices, **stage)
    assert found.shape() == shape
    assert (found.config.num_layers, found.config.vocab_size) == (1, 256)


def test_pairs_that_a_kernel_visits(monkeypatch):
    monkeypatch.setattr(host, "cores", lambda: 2)  # on one core tiles are smaller
    found = sampled(model={"pattern": ("local", "global"), "window": 100}, seq_len=4096)
    # Whole tiles of 512 on and below the diagonal, smaller ones in a band.
    assert found.visited("global", 1, 4096) == 512 * 512 * 8 * 9 // 2
    assert 4096 * 100 < found.visited("local", 1, 4096) < 4096 * 400
    assert found.visited("global", 1, 4096, group=1024) < 4096 * 2048
    assert found.visited("global", 1, 64) == 64 * 64
    found.is_cpu = False
    assert found.visited("global", 1, 4096) == 4096 * 4097 // 2


def test_what_is_recomputed_takes_time_again():
    policies = get_args(get_type_hints(ExecutionConfig)["remat"])
    assert set(forecast.RECOMPUTED) == set(policies) - {"auto"}


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
    found = forecast.step_seconds(run, [given.build(0), given.build(1)])
    assert set(found) == {0, 1} and all(0 < seconds < 10 for seconds in found.values())
