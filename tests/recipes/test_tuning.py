"""A merge trained further as one config: merged once, started from with noise or without, refused where it makes no sense."""

import dataclasses
import runpy

import jax
import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.core.trees import paths
from lcx.recipes import extension, models, tuning
from lcx.recipes.recipe import recipe
from lcx.training.builder import StageBuilder
from lcx.training.resume import from_initial_weights
from tests.merging.folders import describe, make

SIZES = {"vocab_size": 258, "rope_theta": 500.0}


@pytest.fixture
def yaml(tmp_path):
    """The file of a merge of two models."""
    base = make(tmp_path / "base", **SIZES)
    other = make(tmp_path / "other", seed=1, near=base, **SIZES)
    listed = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (base, other)]
    return describe(tmp_path / "both.yml", merge_method="linear", models=listed)


def given(source, **changes):
    config = runpy.run_path("configs/tune_merge.py")["get_config"]()
    config.source, config.data.parts.task.kind = str(source), "text"
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def started(run):
    """The parameters with which a run begins."""
    builder = StageBuilder(run, [], jax.devices()[:1], models.initial_weights(run.init_from))
    return dict(paths(jax.device_get(from_initial_weights(builder, builder.build(0)).state.params)))


def test_a_merge_is_made_once_and_trained_from(yaml, capsys):
    chosen = recipe(tuning.complete(given(yaml, steps=3, tokens_per_step=128)))
    folder = yaml.with_suffix("")
    assert "merged 2 models by linear" in capsys.readouterr().out
    (stage,) = chosen.run.stages
    assert (stage.name, stage.steps, stage.seq_len, stage.batch_size, stage.length) == ("tune_64", 3, 64, 2, 64)
    assert (chosen.run.init_from, chosen.run.positions["global"]["theta"]) == (str(folder), 500.0)
    assert chosen.evals.lengths == (64,) and chosen.base_stage is None
    tuning.complete(given(yaml))
    assert "merged" not in capsys.readouterr().out
    yaml.write_text(yaml.read_text().replace("0.5", "0.6", 1))
    with pytest.raises(UserError, match=r"both is not the merge that .*both.yml describes; delete or rename the folder"):
        tuning.complete(given(yaml))


def test_noise_is_in_proportion_and_the_same_again(yaml):
    run = recipe(tuning.complete(given(yaml))).run
    plain = started(run)
    noisy, again = (started(dataclasses.replace(run, init_noise=0.05)) for _ in range(2))
    for path, before in plain.items():
        np.testing.assert_array_equal(noisy[path], again[path])
        if before.size > 200:
            change = np.sqrt(np.mean(np.square(noisy[path] - before)) / np.mean(np.square(before)))
            assert 0.04 < change < 0.06, path


def test_a_merge_can_be_extended(yaml):
    config = extension.defaults()
    config.source, config.target = str(yaml), 256
    run = recipe(extension.complete(config)).run
    assert (run.init_from, run.stages[-1].seq_len) == (str(yaml.with_suffix("")), 256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": None}, "config.source is missing; name a merge's YAML file"),
        ({"source": "nowhere.yml"}, "config.source='nowhere.yml' is not a Hugging Face model.*or the .yml file of a merge"),
        ({"seq_len": 65}, "config.seq_len=65 exceeds the 64 tokens that .*both was trained for; lower it, or extend the model"),
        ({"steps": 0}, "config.steps=0"),
        ({"init_noise": -0.1}, "config.init_noise=-0.1"),
    ],
)
def test_wrong_values(yaml, changes, message):
    config = given(yaml)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=message):
        recipe(tuning.complete(config))


def test_noise_needs_weights_that_are_trained(yaml):
    config = given(yaml, init_noise=0.1)
    config.lora.rank = 2
    with pytest.raises(UserError, match="init_noise=0.1 has no effect on a model below adapters"):
        recipe(tuning.complete(config))
