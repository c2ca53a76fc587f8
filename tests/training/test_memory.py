"""A stage that does not fit is refused before anything is read or run; what fits is trained."""

import dataclasses

import jax
import pytest
import tiny

from lcx.core.errors import UserError
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.core.trees import num_bytes, num_elements
from lcx.training import memory
from lcx.training.builder import StageBuilder
from lcx.training.loop import train
from lcx.training.stages import run_config

WIDE = {**tiny.config()["model"], "model_dim": 1 << 15, "mlp_dim": 1 << 20, "num_layers": 8}
"""Ten thousand times the memory of a test machine's in weights alone."""


def built(devices, **changes):
    run = run_config(tiny.config(**changes))
    builder = StageBuilder(run, [], devices)
    return run, builder.build(1)


def test_the_least_is_counted_exactly():
    run, stage = built(jax.devices()[:1])
    need = memory.least(run, stage.stage, stage.step)
    state = stage.step.abstract_state()
    numbers = num_elements(state.params)
    tokens = 2 * 128  # of a microbatch
    assert need == {
        "parameters": 4 * numbers,
        "optimizer state": num_bytes(state.opt_state),
        "logits": 4 * tokens * 256,
        "inputs of the layers": 4 * 2 * tokens * 16,
        "gradients": 4 * numbers,
    }
    assert need["optimizer state"] == pytest.approx(8 * numbers, rel=1e-3)  # AdamW's two moments


def test_it_is_what_a_device_of_a_mesh_holds(devices):
    run, stage = built(devices, mesh={"fsdp": 2, "tensor": 2, "context": 2})
    whole, _ = built(devices[:1]), None
    need, alone = memory.least(run, stage.stage, stage.step), memory.least(whole[0], whole[1].stage, whole[1].step)
    assert need["inputs of the layers"] == alone["inputs of the layers"] / 4  # rows by 2, sequences by 2
    assert alone["parameters"] / 8 <= need["parameters"] < alone["parameters"] / 4


def test_frozen_layers_need_no_inputs_and_no_gradients():
    run, stage = built(jax.devices()[:1], optim={"freeze": ("^layers/", "^embed")})
    need = memory.least(run, stage.stage, stage.step)
    assert "inputs of the layers" not in need
    assert need["gradients"] < need["parameters"] / 2


def test_a_hopeless_run_stops_before_anything_is_read(tmp_path):
    values = tiny.config(model=WIDE, data={"parts": {"text": {"source": {"kind": "text", "path": "nowhere/*.txt"}}}})
    with pytest.raises(UserError) as caught:
        train(run_config(values), tmp_path / "run", jax.devices()[:1])
    said = str(caught.value)
    assert said.startswith("stages.base: a step of 64 tokens a row needs at least ")
    for words in ("(parameters ", "optimizer state ", "but there are ", "shorter rows", "accumulate", "remat=", "bfloat16"):
        assert words in said
    assert not (tmp_path / "run").exists()


class Program:
    """A compiled step that says what it needs."""

    def __init__(self, temporaries):
        self.temporaries = temporaries

    def memory_analysis(self):
        numbers = {"argument_size_in_bytes": 10**9, "output_size_in_bytes": 10**9, "alias_size_in_bytes": 10**9}
        return dataclasses.make_dataclass("Stats", [*numbers, "temp_size_in_bytes"])(*numbers.values(), self.temporaries)


def test_a_compiled_step_is_refused_warned_of_or_passed(capsys):
    run, stage = built(jax.devices()[:1])
    free = memory.room(stage.mesh)
    assert free > 1e8

    def check(share):
        memory.check_program(run, stage.stage, stage.step, Program(int(share * free)))
        return capsys.readouterr().err

    assert check(0.5) == ""
    assert "warning: stages.longer: a step of 128 tokens a row needs" in " ".join(check(1.0).split())
    wanted = r"stages\.longer: .* needs [\d,.]+ GB of memory \(its arguments 1\.0 GB, .* but there are [\d,.]+ GB; try shorter rows"
    with pytest.raises(UserError, match=wanted):
        check(2.0)


def test_a_compiled_step_says_what_it_needs(capsys):
    run, stage = built(jax.devices()[:1])
    state = stage.step.abstract_state()
    program = stage.step.compile(state, stage.batch(0), stage.buffers)
    found = program.memory_analysis()
    assert found.argument_size_in_bytes >= num_bytes(state)
    assert found.alias_size_in_bytes > 0.9 * num_bytes(state.params)
    least = memory.least(run, stage.stage, stage.step)
    needed = found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    assert needed > sum(least.values())
    memory.check_program(run, stage.stage, stage.step, program)
    assert capsys.readouterr().err == ""


def test_devices_of_a_host_share_its_memory(devices):
    one, all_of_them = (make_mesh(MeshConfig(), some) for some in (devices[:1], devices))
    assert memory.room(all_of_them) == pytest.approx(memory.room(one) / 8, rel=0.2)
