"""Runs that train adapters, or some parameters only: what their checkpoints hold, and that they resume bitwise."""

import shutil

import jax
import numpy as np
import pytest
import tiny

from lcx.adapters import lora
from lcx.core.errors import UserError
from lcx.core.trees import paths
from lcx.training.loading import load_kept, load_meta, load_params
from lcx.training.loop import train
from lcx.training.metrics import TIMING, read
from lcx.training.stages import run_config

LORA = {"rank": 2, "alpha": 8.0, "dora": True, "train": ("norm",)}
STAGES = [
    {"name": "some", "seq_len": 64, "steps": 4, "batch_size": 4, "positions": {"default": 200.0}},
    {"name": "longer", "seq_len": 128, "steps": 6, "batch_size": 4, "positions": {"default": 400.0}},
]


def go(workdir, base, **changes):
    values = tiny.config(stages=STAGES, init_from=str(base), checkpoint={"every": 4}, monitor={"enabled": False}, **changes)
    return train(run_config(values), workdir, jax.devices()[:1])


def rows(workdir):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read(workdir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("base")
    train(run_config(tiny.config(stages=tiny.stages()[:1])), workdir, jax.devices()[:1])
    return workdir


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("adapted")
    return workdir, go(workdir, base, lora=LORA)


def test_a_checkpoint_holds_what_is_trained(adapted, base):
    workdir, result = adapted
    held = {path for path, _ in paths(load_kept(workdir).params)}
    assert held == {path for path, _ in paths(result.params) if path.endswith(("/a", "/b", "/magnitude")) or "norm" in path}
    record = load_meta(workdir).base
    assert record["path"] == str(base) and len(record["fingerprint"]) == 16
    assert rows(workdir)[-1]["loss"] < rows(workdir)[0]["loss"]


def test_what_is_loaded_has_its_adapters_folded_in(adapted, base):
    workdir, result = adapted
    loaded, before = load_params(workdir), load_params(base)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, lora.fold(result.params))
    old, new = dict(paths(before.params)), dict(paths(loaded.params))
    changed = {path for path in old if not np.array_equal(old[path], new[path])}
    assert changed == {path for path in old if "norm" in path or "attention" in path and path.endswith("kernel")}
    assert loaded.meta.length == 128 and loaded.schemes["default"].theta == 400.0


@pytest.mark.parametrize("kept", [4, 8])
def test_a_run_with_adapters_resumes_bitwise(adapted, base, tmp_path, kept):
    """From the end of a stage, and from the middle of the next one."""
    workdir, result = adapted
    shutil.copytree(workdir, tmp_path / "again")
    for step in (path for path in (tmp_path / "again" / "checkpoints").iterdir() if path.name.isdigit() and int(path.name) > kept):
        shutil.rmtree(step)
    again = go(tmp_path / "again", base, lora=LORA)
    assert rows(tmp_path / "again") == rows(workdir)
    jax.tree.map(np.testing.assert_array_equal, again.params, result.params)


def test_a_stage_frees_what_another_freezes(base, tmp_path):
    stages = [{**STAGES[0], "optim": {"freeze": ("/mlp/", "embed")}}, {**STAGES[1], "optim": {"freeze": ("embed",)}}]
    values = tiny.config(stages=stages, init_from=str(base), monitor={"enabled": False})
    train(run_config(values), tmp_path / "run", jax.devices()[:1])
    old, middle, new = (
        dict(paths(load_params(*where).params)) for where in ((base,), (tmp_path / "run", None, "some"), (tmp_path / "run",))
    )
    for path in old:
        assert np.array_equal(old[path], middle[path]) == ("/mlp/" in path or "embed" in path), path
        assert np.array_equal(middle[path], new[path]) == ("embed" in path), path
    # The table of embeddings is trained in no stage, so that no checkpoint holds it.
    assert set(old) - {path for path, _ in paths(load_kept(tmp_path / "run").params)} == {"embed/embedding"}


@pytest.mark.slow
def test_a_run_over_a_quantised_base_resumes_bitwise(base, tmp_path):
    """Through the end of a stage; what is loaded afterwards has the base as its own run left it."""
    over = LORA | {"base_dtype": "nf4"}
    result = go(tmp_path / "run", base, lora=over)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "10")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "8")
    again = go(tmp_path / "again", base, lora=over)
    assert rows(tmp_path / "again") == rows(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, again.params, result.params)
    up = [dict(paths(load_params(where).params))["layers/mlp/up/kernel"] for where in (base, tmp_path / "run")]
    np.testing.assert_array_equal(*up)
    assert rows(tmp_path / "run")[-1]["loss"] < rows(tmp_path / "run")[0]["loss"]


@pytest.mark.slow
def test_adapters_of_adapters(adapted, base, tmp_path):
    """A run with adapters is a model like any other, for the next one too."""
    workdir, _ = adapted
    result = go(tmp_path / "next", workdir, lora={"rank": 1})
    assert load_meta(tmp_path / "next").base["path"] == str(workdir)
    before, after = dict(paths(load_params(workdir).params)), dict(paths(load_params(tmp_path / "next").params))
    assert np.array_equal(before["layers/mlp/up/kernel"], after["layers/mlp/up/kernel"])
    assert not np.array_equal(before["layers/attention/query/kernel"], after["layers/attention/query/kernel"])
    assert any(lora.is_adapter(path) for path, _ in paths(result.params))


def test_a_base_that_is_gone_or_another(adapted, base, tmp_path):
    workdir, _ = adapted
    own = tmp_path / "base"
    shutil.copytree(base, own)
    go(tmp_path / "run", own, lora=LORA)
    shutil.move(own, tmp_path / "moved")
    with pytest.raises(UserError, match=f"{own} does not exist, and the run trained only some of its parameters"):
        load_params(tmp_path / "run")
    train(run_config(tiny.config(stages=tiny.stages()[:1], seed=1)), own, jax.devices()[:1])
    with pytest.raises(UserError, match="is not the model that the run was started from: its files have changed since"):
        load_params(tmp_path / "run")


def test_adapters_need_a_model(tmp_path):
    with pytest.raises(UserError, match="name it with init_from, or set lora.rank=None"):
        run_config(tiny.config(lora=LORA))
    with pytest.raises(UserError, match="config.lora has no field 'rnak'; did you mean 'rank'"):
        run_config(tiny.config(init_from="x", lora={"rnak": 2}))
    with pytest.raises(UserError, match="lora.dora has no effect without adapters; give lora.rank too"):
        run_config(tiny.config(init_from="x", lora={"dora": True}))
