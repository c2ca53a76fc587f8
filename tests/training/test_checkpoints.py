"""What is kept, what a full disk does, and growing tables."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.training.checkpoints import Store
from lcx.training.meta import Meta
from lcx.training.stages import CheckpointConfig
from lcx.training.step import TrainState

ROOT = Path(__file__).parents[2]


def state(value, size=8):
    params = {"w": jnp.full((size,), float(value))}
    return TrainState(params, {}, {"mu": {"w": jnp.zeros((size,))}}, *(jnp.int32(value) for _ in range(3)))


def meta(step):
    positions = {"default": {"name": "rope", "theta": 100.0}}
    return Meta("a", 0, 0, step, step, 64, 0, "f", positions, (1.5, float("nan")), {"text_loss": 0.1})


def abstract(_):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state(0))


def test_newest_multiples_and_stage_ends_are_kept(tmp_path):
    with Store(tmp_path, CheckpointConfig(keep_latest=2, keep_every=4), ends=[3]) as store:
        for step in range(1, 11):
            store.save(state(step), meta(step))
        store.wait()
        assert store.steps == [3, 4, 8, 9, 10]
    with Store(tmp_path, CheckpointConfig(), ends=[3]) as store:
        found, record = store.restore(abstract, lambda m: True)
        assert record.step == 10 and record.schemes["default"].theta == 100.0 and np.isnan(record.losses[1])
        np.testing.assert_array_equal(found.params["w"], np.full(8, 10.0))
        assert found.in_a_row == 10
        store.drop_after(4)
        assert store.steps == [3, 4]


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path):
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    now = state(1, size=1 << 20)
    with Store(tmp_path, CheckpointConfig()) as store:
        store.save(now, meta(1))
        for _ in range(5):
            now = advance(now)
        store.wait()
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), now)
        np.testing.assert_array_equal(store.read(1, like).params["w"], 1.0)


FULL = """
import resource, sys
sys.path[:0] = [{root!r}, {here!r}]
import test_checkpoints as t
from lcx.core.console import friendly_errors
with friendly_errors(), t.Store({workdir!r}, t.CheckpointConfig()) as store:
    store.save(t.state(1), t.meta(1))
    store.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    big = t.state(2, 1 << 20)
    big = big.replace(params={{"w": t.jax.random.normal(t.jax.random.key(0), (1 << 20,))}})
    store.save(big, t.meta(2))
    store.wait()
    print("not reached")
"""


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    program = FULL.format(root=str(ROOT), here=str(Path(__file__).parent), workdir=str(tmp_path))
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ})
    assert child.returncode == 1, child.stderr
    assert "not reached" not in child.stdout
    assert "error: checkpoint 2 could not be written" in child.stderr and "it resumes from step 1" in child.stderr
    assert "Traceback" not in child.stderr
    with Store(tmp_path, CheckpointConfig()) as store:
        found, record = store.restore(abstract, lambda m: True)
    assert record.step == 1
    np.testing.assert_array_equal(found.params["w"], np.ones(8))


def test_a_disk_without_room_is_seen_before_anything_is_written(tmp_path):
    from lcx.core.errors import UserError

    huge = jax.ShapeDtypeStruct((1 << 50,), jnp.float32)
    with Store(tmp_path, CheckpointConfig()) as store:
        store.save(state(1), meta(1))
        with pytest.raises(UserError, match=r"checkpoint 2 needs .* MB left; free disk space .* resumes from step 1"):
            store.save(state(2).replace(params={"w": huge}), meta(2))
        assert store.steps == [1]
