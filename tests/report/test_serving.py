"""What transformers and vLLM make of an exported config.json: the extended length and theta, in every form of positions."""

import importlib.util
import json

import pytest
import transformers

from lcx.interop import hf_config
from lcx.interop.families import LENGTHS
from lcx.interop.hf_config import write
from lcx.model import presets
from lcx.model.config import ModelConfig
from lcx.positions.registry import from_config
from lcx.report import serving

TRAINED, LENGTH, THETA = 256, 4096, 31000.0
SIZES = dict(vocab_size=258, model_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32)
OF_TRAINED = f"theta={THETA},original_length={TRAINED}"
POSITIONS = {
    "default": f"rope:theta={THETA}",
    "linear": f"linear:theta={THETA},factor=16",
    "yarn": f"yarn:{OF_TRAINED},factor=16",
    "dynamic": f"dynamic:{OF_TRAINED},factor=16",
    "llama3": f"llama3:{OF_TRAINED},factor=16,low_freq_factor=1,high_freq_factor=4",
    "longrope": f"longrope:{OF_TRAINED},factor=16,short_factor=(1,1,1,1),long_factor=(2,4,8,16)",
}
"""Rope type -> the scheme of a model extended 16 times."""


def exported(positions, length=LENGTH, base=None, **changes):
    model = ModelConfig(**{**SIZES, **changes})
    return write(model, {kind: from_config(positions) for kind in model.kinds}, length, "float32", base)


@pytest.mark.parametrize("kind", POSITIONS)
def test_theta_stands_in_both_places_and_transformers_reads_it(kind, tmp_path):
    """transformers 5 takes theta from `rope_parameters` alone; without it there it would be 10,000, whatever stands besides."""
    values = exported(POSITIONS[kind])
    assert values["rope_parameters"]["rope_theta"] == values["rope_theta"] == THETA
    (tmp_path / "config.json").write_text(json.dumps(values))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert read.rope_parameters["rope_theta"] == THETA and read.rope_parameters["rope_type"] == kind
    # Dynamic NTK is the one that declares the length before, from which it stretches by itself.
    assert read.max_position_embeddings == (TRAINED if kind == "dynamic" else LENGTH)
    assert read.rope_parameters.get("original_max_position_embeddings", TRAINED) == TRAINED


def test_theta_of_layers_of_both_kinds(tmp_path):
    gemma = presets.family("gemma3_4b")
    schemes = {"local": from_config("rope:theta=10000"), "global": from_config(f"rope:theta={THETA}")}
    values = write(presets.shrink(gemma.model), schemes, LENGTH, "float32", {"model_type": "gemma3_text"})
    (tmp_path / "config.json").write_text(json.dumps(values))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert read.rope_parameters["full_attention"]["rope_theta"] == values["rope_theta"] == THETA
    assert read.rope_parameters["sliding_attention"]["rope_theta"] == values["rope_local_base_freq"] == 10000
    assert read.max_position_embeddings == serving.vllm_length(values) == LENGTH


@pytest.mark.parametrize("kind", POSITIONS)
def test_what_vllm_takes_for_the_length(kind):
    """Linear scaling is multiplied by its factor again, so that only `--max-model-len` holds vLLM to what was trained."""
    values = exported(POSITIONS[kind])
    wanted = LENGTH * 16 if kind == "linear" else LENGTH
    assert serving.vllm_length(values) == wanted
    shown = serving.vllm("longer", values, LENGTH)
    assert f"```\nvllm serve longer --max-model-len {LENGTH}\n```" in shown
    assert ("would offer 65,536 tokens" in shown) == (kind == "linear")
    assert ("otherwise offers the 256 tokens before" in shown) == (kind == "longrope")
    assert ("answers differ" in shown) == (kind == "dynamic")


def test_yarn_beyond_its_factor_has_to_be_allowed():
    values = exported(f"yarn:{OF_TRAINED},factor=4")
    assert serving.vllm_length(values) == 4 * TRAINED
    assert f"\nVLLM_ALLOW_LONG_MAX_MODEL_LEN=1 vllm serve x --max-model-len {LENGTH}\n" in serving.vllm("x", values, LENGTH)


@pytest.mark.parametrize("key", LENGTHS)
def test_no_other_key_keeps_the_old_length(key):
    """vLLM takes the lowest of them; what came with the model before its extension must not stay."""
    base = {**exported(POSITIONS["default"], TRAINED), key: TRAINED}
    values = exported(POSITIONS["default"], base=base)
    assert values[key] == LENGTH == serving.vllm_length(values)
    assert exported(POSITIONS["default"], TRAINED, base=base)[key] == TRAINED
    assert exported(POSITIONS["default"], base={**base, key: 1 << 20})[key] == 1 << 20


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("kind", POSITIONS)
def test_vllm_reads_the_same(kind, tmp_path):
    from vllm.transformers_utils.config import get_config

    (tmp_path / "config.json").write_text(json.dumps(exported(POSITIONS[kind])))
    read = get_config(str(tmp_path), trust_remote_code=False)
    assert read.rope_parameters["rope_theta"] == THETA and read.rope_parameters["rope_type"] == kind


def test_commands_for_adapters_give_the_new_positions():
    values = exported(POSITIONS["linear"])
    shown = serving.vllm_adapter("adapter", "models/base", values, LENGTH, 12)
    assert "--max-lora-rank 16 --lora-modules adapter=adapter" in shown
    overrides = json.loads(shown.partition("--hf-overrides '")[2].partition("'")[0])
    assert overrides == {"rope_parameters": values["rope_parameters"], "max_position_embeddings": LENGTH}


def test_llama_cpp():
    values = exported(POSITIONS["yarn"])
    shown = serving.llama_server("longer", values, LENGTH, "runs/longer")
    assert "lcx export --checkpoint=runs/longer --format=gguf --out=longer.gguf\nllama-server -m longer.gguf -c 4096" in shown
    assert serving.llama_server("longer.gguf", values, LENGTH, None).startswith("```\nllama-server -m longer.gguf -c 4096\n```")
    shown = serving.llama_server("longer", exported(POSITIONS["dynamic"]), LENGTH, "runs/longer")
    assert shown.startswith("Not for llama.cpp: ") and "```" not in shown


def test_a_tokenizer_that_declares_fewer_tokens_is_raised(tmp_path):
    from lcx.interop.folder import copy_companions

    source, out = tmp_path / "source", tmp_path / "out"
    for name, declared in (("few", 256), ("many", 1e30), ("none", None)):
        (source / name).mkdir(parents=True)
        (out / name).mkdir(parents=True)
        text = json.dumps({"tokenizer_class": "x"} | ({} if declared is None else {"model_max_length": declared}))
        (source / name / "tokenizer_config.json").write_text(text)
        copy_companions(source / name, out / name, LENGTH)
        found = json.loads((out / name / "tokenizer_config.json").read_text())
        assert found.get("model_max_length") == (LENGTH if declared == 256 else declared)
    assert hf_config.LENGTH == "max_position_embeddings"
