"""How many devices share a model's heads on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from lcx.core import host_devices
from lcx.core.mesh import MeshConfig
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.recipes.cores import evaluation_mesh, on_cores
from lcx.training.stages import RunConfig, StageConfig

ROOT = Path(__file__).parents[2]
STAGE = StageConfig("one", seq_len=64, steps=2, batch_size=2)
RUN = RunConfig(ModelConfig(num_heads=8, num_kv_heads=2), (STAGE,))

PROGRAM = """
import jax
from lcx.core import host
host.cores = lambda: 4
from tests.core.test_host_devices import RUN
from lcx.recipes.cores import evaluation_mesh, on_cores

mesh = on_cores(RUN).mesh
print(mesh.fsdp, mesh.context, mesh.ulysses, jax.device_count())
"""


@pytest.mark.parametrize(
    ("cores", "sizes", "count"),
    [(1, (8, 8), 1), (2, (9, 3, 64), 1), (4, (8, 2, 64), 2), (4, (9, 3, 96), 3), (6, (12, 12, 2000), 4), (2, (4, 4, 65), 1)],
)
def test_the_most_that_divide_everything(cores, sizes, count):
    assert host_devices.most_sharing(cores, sizes) == count


@pytest.mark.parametrize(("flags", "said"), [("", "1 2 2 2"), ("--xla_force_host_platform_device_count=1", "-1 1 1 1")])
def test_a_run_is_shared_unless_the_user_chooses_the_devices(flags, said):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    env.pop("JAX_NUM_CPU_DEVICES", None)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [said], done.stderr
    assert ("2 CPU devices share the heads" in done.stdout) == (not flags)


def test_a_run_stays_as_it_is_once_jax_has_started():
    assert on_cores(RUN) is RUN and host_devices.sharing() == 1


@pytest.mark.parametrize(
    ("mesh", "asked"),
    [(MeshConfig(), True), (MeshConfig(fsdp=1, context=-1), True), (MeshConfig(tensor=2), False), (MeshConfig(data=4), False)],
)
def test_a_mesh_that_is_named_is_taken(monkeypatch, mesh, asked):
    calls = []
    monkeypatch.setattr(host_devices, "share", lambda *sizes: calls.append(sizes))
    on_cores(RunConfig(RUN.model, RUN.stages, mesh=mesh))
    assert calls == [(8, 2, [64])] * asked
    calls.clear()
    # Rows that are walked in chunks are on one device.
    on_cores(RunConfig(RUN.model, RUN.stages, ExecutionConfig(recurrent_chunk=32), mesh=mesh))
    assert calls == []
    calls.clear()
    on_cores(RunConfig(RUN.model, (StageConfig("one", 64, 2, 2, mesh=mesh),)))
    assert not calls


def test_an_evaluation_is_shared_as_its_model_allows(tmp_path, monkeypatch):
    transformers.LlamaConfig(num_attention_heads=16, num_key_value_heads=8).save_pretrained(tmp_path)
    calls = []
    monkeypatch.setattr(host_devices, "share", lambda *sizes: calls.append(sizes))
    monkeypatch.setattr(host_devices, "sharing", lambda: 8)
    mesh = evaluation_mesh(tmp_path)
    assert mesh is not None and mesh.shape["ulysses"] == 8 and calls == [(16, 8, ())]
    monkeypatch.setattr(host_devices, "sharing", lambda: 1)
    assert evaluation_mesh(tmp_path) is None
