"""Model cards: what was trained and measured, whose licence holds, and that nothing is claimed of other weights."""

import dataclasses
import json

import pytest
import yaml

from lcx.evals import results
from lcx.evals.results import EvalResult
from lcx.interop import hf_config
from lcx.model.config import ModelConfig
from lcx.positions.registry import from_config
from lcx.report import card
from lcx.training.meta import Meta
from lcx.training.stages import RunConfig, StageConfig
from tests.report import synthetic

MODEL = ModelConfig(vocab_size=258, model_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32)
STAGES = (StageConfig("base", 256, 40, 8), StageConfig("far", 4096, 20, 2))
POSITIONS = {"default": {"name": "rope", "theta": 31000.0}}
SOURCE = "---\nlicense: llama3.2\nlicense_name: own\nlanguage:\n- en\ntags:\n- old\n---\n\n# The source\n"


def exported(workdir, step=60, **changes):
    """The end of the made-up run's second stage, or of its first."""
    index = int(step > 40)
    stage = STAGES[index]
    schemes = {kind: from_config(POSITIONS["default"]) for kind in MODEL.kinds}
    values = hf_config.write(MODEL, schemes, stage.length, "bfloat16")
    meta = Meta(stage.name, index, 0, stage.steps, step, stage.length, 0, "", POSITIONS)
    run = changes.pop("run", RunConfig(MODEL, STAGES, positions=POSITIONS))
    return card.Exported(
        "longer", "hf", "bfloat16", values, 1_234_567, run, meta, workdir, "runs/longer", has_template=True, **changes
    )


@pytest.fixture
def workdir(tmp_path):
    synthetic.write_run(tmp_path / "run")
    return tmp_path / "run"


def test_a_card_says_what_was_done_and_measured(workdir):
    shown = card.text(exported(workdir))
    assert "# longer\n\n1.23M parameters in bfloat16, for 4,096 tokens, trained from scratch with lcx." in shown
    # The try that was kept, not the one that the monitor rolled back.
    assert "| far | 4,096 | 31K | 20 | 2 | 163,840 |" in shown and "| base | 256 | 500 | 40 | 8 | 81,920 |" in shown
    assert "All parameters were trained, with adamw, learning rate 0.001." in shown
    assert 'Positions, as in `config.json`: `{"rope_type": "default", "rope_theta": 31000.0}`.' in shown
    assert "| needles | multikey | 70% | stdlib |" in shown
    assert "| needles | before | 98.3 | 26.7 | 5.0 | 0.0 |" in shown
    assert "| needles | after | 100.0 | 100.0 | 96.7 | 98.3 |" in shown
    assert "| perplexity | after | 4 | 3.75 | 3.5 | 3.25 |" in shown
    # In the report's own words.
    assert "- effective length: **256 → 4,096** (longest with more than 85.6% of needles; 95% interval" in shown
    assert "- needles beyond 256 tokens: **10.6% → 98.3%**" in shown
    assert "vllm serve longer --max-model-len 4096" in shown and "llama-server -m longer.gguf -c 4096" in shown
    assert "apply_chat_template" in shown


def test_rows_whose_positions_skip_are_told_from_long_ones(workdir):
    skipping = dataclasses.replace(STAGES[1], seq_len=1024, max_position=4096)
    shown = card.text(exported(workdir, run=RunConfig(MODEL, (STAGES[0], skipping), positions=POSITIONS)))
    assert "| far | 1,024, positions up to 4,096 | 31K | 20 | 2 | 40,960 |" in shown


def test_evaluations_of_other_weights_are_not_claimed(workdir):
    before = card.text(exported(workdir, step=40))
    assert "| needles |  | 98.3 | 26.7 | 5.0 | 0.0 |" in before and "98.3 |\n| needles | after" not in before
    assert "| far |" not in before
    others = dataclasses.replace(results.read(workdir / "eval" / "after.json"), step=50)
    results.write(others, workdir / "eval" / "after.json")
    shown = card.text(exported(workdir))
    assert "These weights were not evaluated." in shown and "| needles | after" not in shown
    # One that somebody made later counts.
    results.write(EvalResult("later", 4096, 60, synthetic.AFTER.rows), workdir / "eval" / "later.json")
    assert "| needles | after | 100.0 |" in card.text(exported(workdir))
    for path in (workdir / "eval").iterdir():
        path.unlink()
    (workdir / "metrics.jsonl").unlink()
    shown = card.text(exported(workdir))
    assert "These weights were not evaluated." in shown and "| far | 4,096 | – | 20 | 2 | 163,840 | – |" in shown


def test_front_matter(workdir, tmp_path):
    (tmp_path / "README.md").write_text(SOURCE)
    values = card.front_matter(card.text(exported(workdir, source=tmp_path, base_model="meta-llama/Llama-3.2-1B")))
    assert values == {
        "license": "llama3.2", "license_name": "own", "language": ["en"], "base_model": "meta-llama/Llama-3.2-1B",
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["lcx", "long-context"],
    }  # fmt: skip
    assert card.front_matter(card.text(exported(workdir, license="mit")))["license"] == "mit"
    assert not {"license", "base_model"} & set(card.front_matter(card.text(exported(workdir))))
    hub = pytest.importorskip("huggingface_hub")
    found = hub.ModelCard(card.text(exported(workdir, source=tmp_path))).data.to_dict()
    assert found["license"] == "llama3.2" and found["library_name"] == "transformers"


@pytest.mark.parametrize("text", ["", "# no front\n", "---\na: [\n---\n", "---\n- a\n---\n", "---\nlicense: mit\n"])
def test_cards_without_front_matter_that_can_be_read(text):
    assert card.front_matter(text) == {}


def test_names_on_the_hub():
    assert card.hub_name("/x/hub/models--meta-llama--Llama-3.2-1B/snapshots/0a1b") == "meta-llama/Llama-3.2-1B"
    assert card.hub_name("models/Llama-3.2-1B") is None and card.hub_name(None) is None


def test_the_files_of_a_card(workdir, tmp_path):
    for name in ("summary", "needles", "loss", "zero_shot"):
        (workdir / "plots").mkdir(exist_ok=True)
        (workdir / "plots" / f"{name}.png").write_bytes(b"png")
    source, out = tmp_path / "source", tmp_path / "longer"
    for folder in (source, out):
        folder.mkdir()
    for name, text in {"README.md": SOURCE, "LICENSE.txt": "terms", "notes.txt": "no"}.items():
        (source / name).write_text(text)
    card.write(exported(workdir, source=source), out)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {"README.md", card.SOURCE_CARD, "LICENSE.txt", "plots/summary.png"}
    assert (out / card.SOURCE_CARD).read_text() == SOURCE
    shown = (out / "README.md").read_text()
    assert f"[{card.SOURCE_CARD}]({card.SOURCE_CARD})" in shown and "](plots/summary.png)" in shown


def test_the_card_of_a_gguf_file_stands_beside_it_and_takes_nobody_elses_place(workdir, tmp_path, capsys):
    written = dataclasses.replace(exported(workdir), form="gguf", name="longer.gguf", dtype="q8_0")
    card.write(written, tmp_path / "longer.gguf")
    shown = (tmp_path / "longer.md").read_text()
    assert (
        "llama-server -m longer.gguf -c 4096" in shown
        and "vllm" not in shown
        and card.front_matter(shown)["library_name"] == "gguf"
    )
    (tmp_path / "longer.md").write_text("mine")
    card.write(written, tmp_path / "longer.gguf")
    assert (tmp_path / "longer.md").read_text() == "mine"
    assert "longer.md is there already and stays as it is" in capsys.readouterr().err


def test_adapters(workdir, tmp_path):
    values = {"lora": {"rank": 12, "train": ("norm",)}, "init_from": "models/base"}
    run = RunConfig(MODEL, STAGES, positions=POSITIONS, init_from="models/base")
    run = dataclasses.replace(run, lora=dataclasses.replace(run.lora, rank=12, train=("norm",)))
    folded = card.text(exported(workdir, run=run))
    assert "trained with lcx from `base`" in folded
    assert "adapters (LoRA, rank 12, alpha 16) of `layers/attention/(query|key|value|out)/`, and `norm` in full" in folded
    assert "folded into the weights" in folded
    apart = dataclasses.replace(exported(workdir, run=run), form="peft", rank=12, adapter_of="models/base")
    shown = card.text(apart)
    assert "An adapter of rank 12" in shown and "vllm serve models/base --max-model-len 4096 --hf-overrides" in shown
    assert "PeftModel.from_pretrained(base, name)" in shown and card.front_matter(shown)["library_name"] == "peft"
    assert values["init_from"] in shown


def test_a_conversion_claims_no_training(workdir):
    converted = exported(None)
    shown = card.text(dataclasses.replace(converted, meta=dataclasses.replace(converted.meta, step=0)))
    assert "a conversion of `longer` by lcx, without any training" in shown and "What was done" not in shown
    assert yaml.safe_load(shown.split("---")[1])["tags"] == ["lcx", "long-context"]
    assert json.dumps(converted.values["rope_parameters"]) not in shown
