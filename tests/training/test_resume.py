"""Weights that have to fit another stage: tables that grow, schemes that begin, sizes that differ."""

import shutil

import jax
import numpy as np
import pytest
import tiny

from lcx.core.errors import UserError
from lcx.core.param_spec import initialize
from lcx.training.builder import StageBuilder
from lcx.training.loop import train
from lcx.training.resume import continue_into, fit
from lcx.training.stages import run_config


def stage_builder(first, second=None, **longer):
    positions = {} if second is None else {"default": second}
    values = tiny.config(positions={"default": first}, stages=tiny.stages(positions=positions, **longer))
    return StageBuilder(run_config(values), [], jax.devices()[:1])


def test_a_learned_table_grows_and_keeps_its_rows():
    builder = stage_builder("learned:max_length=64", "learned:max_length=128")
    short, long = builder.build(0), builder.build(1)
    params = initialize(short.specs, jax.random.key(0))
    grown = fit(params, long, 1, "weights")
    (kind,) = grown["positions"]
    (old,), (new,) = jax.tree.leaves(params["positions"][kind]), jax.tree.leaves(grown["positions"][kind])
    assert (old.shape[0], new.shape[0]) == (64, 128)
    np.testing.assert_array_equal(new[:64], old)
    assert np.all(np.isfinite(new)) and np.any(new[64:] != 0)


def test_a_learned_scheme_begins_and_ends():
    builder = stage_builder("rope:theta=100", "learned:max_length=128")
    params = initialize(builder.build(0).specs, jax.random.key(0))
    begun = fit(params, builder.build(1), 1, "weights")
    assert "positions" in begun and "positions" not in fit(begun, builder.build(0), 1, "weights")
    np.testing.assert_array_equal(begun["embed"]["embedding"], params["embed"]["embedding"])


def test_other_sizes_are_an_error():
    built = stage_builder("rope:theta=100").build(0)
    params = initialize(built.specs, jax.random.key(0))
    params["embed"]["embedding"] = params["embed"]["embedding"][:, :8]
    with pytest.raises(
        UserError, match=r"weights do not fit the model: embed/embedding is of shape \(256, 8\) there but \(256, 16\)"
    ):
        fit(params, built, 1, "weights")


@pytest.mark.parametrize("keep", [True, False])
def test_optimizer_state_is_kept_or_reset(keep):
    builder = stage_builder("rope:theta=100", 400.0, keep_optimizer_state=keep)
    short, long = builder.build(0), builder.build(1)
    state = short.step.state_from_params(initialize(short.specs, jax.random.key(0)))
    state = state.replace(opt_state=jax.tree.map(lambda x: x + 1, state.opt_state), step=state.step + 8, skipped=state.skipped + 2)
    after = continue_into(state, long, 0)
    assert (after.step, after.skipped, after.in_a_row) == (0, 2, 0)
    moments = np.concatenate([np.ravel(x) for x in jax.tree.leaves(after.opt_state)])
    np.testing.assert_array_equal(moments, float(keep))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "adafactor", "lion"])
def test_every_optimizer_resumes(name, tmp_path):
    values = tiny.config(optim={"name": name, "lr": 3e-3, "freeze": ("embed",)})
    whole = train(run_config(values), tmp_path / "whole", jax.devices()[:1])
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "18")
    again = train(run_config(values), tmp_path / "cut", jax.devices()[:1])
    jax.tree.map(np.testing.assert_array_equal, whole.params, again.params)


def test_another_optimizer_starts_from_scratch(capfd):
    builder = stage_builder("rope:theta=100", 400.0, keep_optimizer_state=True, optim={"name": "lion"})
    short, long = builder.build(0), builder.build(1)
    after = continue_into(short.step.state_from_params(initialize(short.specs, jax.random.key(0))), long, 0)
    assert jax.tree.structure(after.opt_state) == jax.tree.structure(long.step.abstract_state().opt_state)
    assert "the optimizer is another one" in " ".join(capfd.readouterr().err.split())
