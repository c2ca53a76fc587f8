"""A recipe as a whole: what is finished is not done again."""

import dataclasses
import shutil

import pytest

from lcx.core.errors import UserError
from lcx.core.mesh import MeshConfig
from lcx.recipes.recipe import defaults, is_finished, part, recipe, run_recipe


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
