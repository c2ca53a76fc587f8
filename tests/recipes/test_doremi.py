"""Three domains of which one can be learned and is not yet: DoReMi as two runs finds it, killed in between or not."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.recipes.doremi import find_mixture, from_stage, single
from lcx.training import metrics
from lcx.training.doremi import DoReMiConfig
from lcx.training.ladder import choose
from lcx.training.stages import run_config

STEPS, ROWS, LENGTH = 60, 12, 64


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`easy`: one letter. `noise`: random letters, of which nothing can be learned but their number. `hard`: each letter follows
    from the one before by a permutation, which takes most of the run."""
    folder, rng = tmp_path_factory.mktemp("domains"), np.random.default_rng(0)
    letters = np.arange(97, 97 + 26, dtype=np.uint8)
    following = rng.permutation(26)
    for i in range(20):
        walk = [int(rng.integers(26))]
        for _ in range(3000):
            walk.append(int(following[walk[-1]]) if rng.random() < 0.9 else int(rng.integers(26)))
        texts = {"easy": np.full(3000, 97, np.uint8), "noise": letters[rng.integers(0, 26, 3000)], "hard": letters[walk]}
        for name, text in texts.items():
            (folder / f"{name}{i}.txt").write_bytes(text.tobytes() + f"{i}".encode())
    parts = {name: {"weight": 1.0, "source": {"kind": "text", "path": f"{folder}/{name}*.txt"}} for name in texts}
    return run_config(
        {
            "model": dict(vocab_size=256, model_dim=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=64),
            "data": {"parts": parts},
            "stages": [{"name": "only", "seq_len": LENGTH, "steps": STEPS, "batch_size": ROWS}],
            "optim": {"lr": 5e-3, "warmup_steps": 4},
            "checkpoint": {"every": 25, "keep_latest": 9},
            "metrics": {"writers": "jsonl", "peak_flops": 1e11},
            "mesh": {"fsdp": 1},
        }
    )


@pytest.fixture(scope="module")
def found(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("doremi")
    return workdir, find_mixture(run, workdir, DoReMiConfig(), devices=jax.devices()[:1])


def test_the_hard_domain_is_found(found):
    workdir, mixture = found
    assert mixture["hard"] > 0.5 and mixture["hard"] > 1.5 * max(mixture["easy"], mixture["noise"])
    assert sum(mixture.values()) == pytest.approx(1)
    assert json.loads((workdir / "mixture.json").read_text()) == {"stage": "only", "mixture": mixture}
    rows = metrics.read(workdir / "proxy" / "doremi.jsonl")
    assert [row["stage_step"] for row in rows] == list(range(1, STEPS + 1))
    average = np.mean([[row["weights"][name] for name in mixture] for row in rows], axis=0)
    np.testing.assert_allclose(average, list(mixture.values()), rtol=1e-9)


def test_the_proxy_is_trained_on_the_weights_of_its_log(found):
    """The reference had the same rows, all with weight 1, and a third of them from each domain."""
    workdir, _ = found
    reference = metrics.read(workdir / "reference" / "metrics.jsonl")
    rows, log = (metrics.read(workdir / "proxy" / name) for name in ("metrics.jsonl", "doremi.jsonl"))
    for plain, row, entry in zip(reference, rows, log, strict=True):
        for name, weight in entry["weights"].items():
            assert row["weight_by_part"][name] == pytest.approx(3 * weight * plain["weight_by_part"][name], rel=1e-5)


def test_a_killed_search_goes_on_bitwise(run, found, tmp_path):
    workdir, mixture = found
    shutil.copytree(workdir, tmp_path / "cut", ignore=shutil.ignore_patterns("60", "50", "mixture.json"))
    shutil.copytree(workdir / "reference", tmp_path / "cut" / "reference", dirs_exist_ok=True)
    assert find_mixture(run, tmp_path / "cut", DoReMiConfig(), devices=jax.devices()[:1]) == mixture
    logs = [(path / "proxy" / "doremi.jsonl").read_text() for path in (workdir, tmp_path / "cut")]
    assert logs[0] == logs[1]
    (tmp_path / "cut" / "proxy" / "doremi.jsonl").unlink()
    shutil.rmtree(tmp_path / "cut" / "proxy" / "checkpoints" / "60")
    with pytest.raises(UserError, match="has 0 of the 50 updates before this step"):
        find_mixture(run, tmp_path / "cut", DoReMiConfig(), devices=jax.devices()[:1])


def test_a_search_with_other_settings_is_not_mixed_in(run, found):
    workdir, _ = found
    with pytest.raises(UserError, match=r"holds a search with .*'step_size': 1.0.*, not .*'step_size': 0.5"):
        find_mixture(run, workdir, DoReMiConfig(step_size=0.5), devices=jax.devices()[:1])


def test_a_later_stage_has_the_schemes_of_those_before_it(run):
    """As in the whole run: a theta that an earlier stage chose, and a stretch from the length that was trained."""
    stage = run.stages[0]
    stages = (
        dataclasses.replace(stage, name="base"),
        dataclasses.replace(stage, name="longer", seq_len=4 * stage.seq_len, positions={"default": 5e5}),
        dataclasses.replace(stage, name="last", seq_len=8 * stage.seq_len, positions={"default": "yarn:factor=2"}),
        dataclasses.replace(stage, name="same", seq_len=8 * stage.seq_len),
    )
    whole = dataclasses.replace(run, stages=stages)
    for index, one in enumerate(stages):
        alone = single(later := from_stage(whole, index, None), later.stages[0], equal=True)
        assert alone.stages[0].name == one.name
        assert choose(alone, (), 0, None)[1] == choose(whole, (), index, None)[1]
    assert choose(whole, (), 3, None)[1]["default"].theta == 5e5


def test_what_cannot_be_weighed(run, tmp_path):
    with pytest.raises(UserError, match="resume_from='x' does not go with DoReMi"):
        find_mixture(dataclasses.replace(run, resume_from="x"), tmp_path, DoReMiConfig())
    with pytest.raises(UserError, match="stage 'other' is not in the config; its stages are only"):
        find_mixture(run, tmp_path, DoReMiConfig(), "other")
    alone = run_config(
        {
            "model": {"vocab_size": 256},
            "data": {"parts": {"easy": {}, "off": {"weight": 0.0}}},
            "stages": [{"name": "only", "seq_len": 64, "steps": 1, "batch_size": 1}],
        }
    )
    with pytest.raises(UserError, match="stage only trains on easy alone"):
        find_mixture(alone, tmp_path, DoReMiConfig())
