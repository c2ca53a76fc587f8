"""A recipe as a whole: what is finished is not done again."""

import dataclasses
import shutil

import pytest

from lcx.core import configs
from lcx.core.errors import UserError
from lcx.core.mesh import MeshConfig
from lcx.evals import results
from lcx.evals.config import EndpointConfig, EvalConfig
from lcx.evals.results import EvalResult, Measurement
from lcx.recipes import models
from lcx.recipes.recipe import (
    defaults,
    evaluate_source,
    evaluate_stage,
    free_label,
    is_finished,
    is_free,
    part,
    recipe,
    run_recipe,
)


@pytest.fixture
def chosen(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(12):
        (corpus / f"{number}.txt").write_text(f"document {number} of the corpus\n" * 40)
    stages = {name: {"seq_len": 32, "steps": 1, "batch_size": 8} for name in ("base", "longer")}
    config = defaults(stages, model_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32)
    config.data.parts = {"text": part(kind="text", source={"kind": "text", "path": str(corpus / "*.txt")})}
    config.data.heldout_fraction = 0.3
    config.base_stage = "base"
    config.evals.lengths, config.evals.perplexity_tokens = (16, 32), 128
    config.metrics.writers = "jsonl"
    return recipe(config)


def test_a_finished_run_is_not_done_again(chosen, tmp_path, capsys):
    workdir = tmp_path / "run"
    run_recipe(chosen, workdir, ["lcx", "run"])
    report, changed = workdir / "report.html", (workdir / "report.html").stat().st_mtime_ns
    # Without its corpus nothing could be trained or evaluated again.
    shutil.rmtree(tmp_path / "corpus")
    capsys.readouterr()
    run_recipe(chosen, workdir, ["lcx", "run"])
    assert "is finished: 2 steps" in " ".join(capsys.readouterr().out.split())
    assert report.stat().st_mtime_ns == changed
    split = dataclasses.replace(chosen.run, mesh=MeshConfig(fsdp=1, context=2, ulysses=2))
    assert is_finished(dataclasses.replace(chosen, run=split), workdir)
    assert not is_finished(dataclasses.replace(chosen, run=dataclasses.replace(split, seed=1)), workdir)
    (workdir / "eval" / "after.json").unlink()
    assert not is_finished(chosen, workdir)
    with pytest.raises(UserError, match="corpus"):
        run_recipe(chosen, workdir, ["lcx", "run"])


def test_lengths_that_no_question_fits_into_are_refused_before_training(chosen, tmp_path):
    evals = dataclasses.replace(chosen.evals, tasks=("ruler_vt", "perplexity"))
    with pytest.raises(UserError, match="evals.lengths has 32, but ruler_vt takes at least"):
        run_recipe(dataclasses.replace(chosen, evals=evals), tmp_path / "run", ["lcx", "run"])
    assert not (tmp_path / "run").exists()


def test_evaluations_lie_on_the_mesh_of_the_longest_rows(chosen, tmp_path, monkeypatch):
    """The run's own mesh may be none of its stages'."""
    short, long = chosen.run.stages
    stages = (short, dataclasses.replace(long, seq_len=64, mesh=MeshConfig(fsdp=2, context=4)))
    split = dataclasses.replace(chosen, run=dataclasses.replace(chosen.run, stages=stages))
    found = []

    def load(path, stage=None, mesh=None):
        found.append(mesh.shape["ring"] * mesh.shape["ulysses"])
        raise UserError("far enough")

    monkeypatch.setattr(models, "load", load)
    for evaluated in (lambda: evaluate_stage(split, tmp_path, "before", "base"), lambda: evaluate_source(split, tmp_path)):
        with pytest.raises(UserError, match="far enough"):
            evaluated()
    assert found == [4, 4]


def test_a_label_is_free_for_the_same_evaluation_alone(tmp_path):
    evals = EvalConfig(lengths=(64,))
    assert is_free(tmp_path, "one", evals, 3)
    rows = (Measurement("passkey", "score", 64, 1.0, 1),)
    (tmp_path / "eval").mkdir()
    results.write(EvalResult("one", 64, 3, rows, settings={"evals": configs.plain(evals)}), tmp_path / "eval" / "one.json")
    assert is_free(tmp_path, "one", evals, 3) and is_free(tmp_path, "one", evals) and is_free(tmp_path, "two", evals, 3)
    assert not is_free(tmp_path, "one", evals, 4) and not is_free(tmp_path, "one", EvalConfig(lengths=(128,)), 3)
    assert free_label(tmp_path, "one", EvalConfig(lengths=(128,))) == "one-2"
    # The same questions under another chat template are another evaluation.
    turns = {"chat_template": "turns.jinja"}
    assert not is_free(tmp_path, "one", evals, 3, **turns) and free_label(tmp_path, "one", evals, **turns) == "one-2"


def test_a_label_is_not_free_for_another_model_or_type(tmp_path):
    evals = EvalConfig(lengths=(64,))
    (tmp_path / "eval").mkdir()

    def keep(**settings):
        settings = {"evals": configs.plain(evals), **settings}
        results.write(EvalResult("one", 64, settings=settings), tmp_path / "eval" / "one.json")

    def free(**others):
        return is_free(tmp_path, "one", evals, **others)

    bfloat16 = {"parameters": 8, "weights_dtype": "bfloat16", "compute_dtype": "bfloat16"}
    keep(**bfloat16)
    assert free(**bfloat16)
    assert not free(**{**bfloat16, "compute_dtype": "float32"}) and not free(**{**bfloat16, "weights_dtype": "float32"})
    # An earlier version did not say in which type the weights were.
    keep(compute_dtype="bfloat16")
    assert free(**bfloat16) and not free(**{**bfloat16, "compute_dtype": "float32"})
    served = configs.plain(EndpointConfig("http://localhost:1/v1", "m"))
    assert not free(endpoint=served)
    keep(endpoint=served)
    assert free(endpoint=served) and free(endpoint={**served, "concurrency": 9, "timeout": 5.0, "retries": 0})
    assert not any(free(endpoint={**served, name: "other"}) for name in ("url", "model", "api")) and not free(**bfloat16)
