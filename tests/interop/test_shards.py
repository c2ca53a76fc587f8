"""Broken files and configs: each is refused with one sentence that names what is wrong."""

import json
import pickle

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lcx.core.errors import UserError
from lcx.interop import hf_config as configs
from lcx.interop.folder import HfFolder, save
from lcx.interop.shards import INDEX, SINGLE
from lcx.model.config import ModelConfig
from lcx.positions.registry import from_config
from tests.interop import hf_models

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with one file and one with shards."""
    root = tmp_path_factory.mktemp("models")
    hf_models.make("llama", root / "single", num_hidden_layers=2)
    hf_models.make("llama", root / "sharded", num_hidden_layers=2, shard="60KB")
    return root


@pytest.fixture
def folder(models, tmp_path, request):
    """A copy of one of them, to break."""
    import shutil

    return shutil.copytree(models / request.param, tmp_path / "model")


def _change(folder, change):
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def _truncate(folder):
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-100])


def _pickled(folder):
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1}))


def _lfs_pointer(folder):
    (folder / SINGLE).write_text(LFS_POINTER)


def _index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def _swap(where):
    one, other = "model.norm.weight", "model.embed_tokens.weight"
    where[one], where[other] = where[other], where[one]


def _nan(tensors):
    tensors["model.norm.weight"][3] = np.nan


def _nan_bfloat16(tensors):
    for name in tensors:
        tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    tensors["lm_head.weight"][7, 7] = np.nan


def _shape(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:-1].copy()


def _quantised(tensors):
    tensors["model.norm.weight"] = np.ones(64, np.int8)


WRONG_FILES = {
    "pickle": ("single", _pickled, r"pytorch_model\.bin is a pickle, which can run arbitrary code"),
    "pickle in the index": ("sharded", lambda f: _index(f, lambda m: m.update({"x": "x.bin"})), r"x\.bin is a pickle"),
    "Git LFS pointer": ("single", _lfs_pointer, "model.safetensors is a Git LFS pointer, not the file itself; run 'git lfs pull'"),
    "no weights": ("single", lambda f: (f / SINGLE).unlink(), "has no model.safetensors and no model.safetensors.index.json"),
    "truncated": ("single", _truncate, "model.safetensors is not a complete safetensors file"),
    "truncated shard": ("sharded", _truncate, r"model-0000\d-of-0000\d.safetensors is not a complete safetensors file"),
    "index is no index": ("sharded", lambda f: (f / INDEX).write_text("{}"), "is not an index of safetensors files"),
    "index is no JSON": ("sharded", lambda f: (f / INDEX).write_text("{"), "is not an index of safetensors files"),
    "missing shard": ("sharded", lambda f: sorted(f.glob("*.safetensors"))[0].unlink(), "does not exist; download the missing"),
    "index escapes": ("sharded", lambda f: _index(f, lambda m: m.update({"x": "../x.safetensors"})), "outside its folder"),
    "index swapped": ("sharded", lambda f: _index(f, _swap), "but it is in model-0000"),
    "index too short": ("sharded", lambda f: _index(f, lambda m: m.pop("model.norm.weight")), "does not list model.norm.weight"),
    "missing tensor": (
        "single",
        lambda f: _change(f, lambda t: t.pop("model.layers.1.input_layernorm.weight")),
        "missing: model.layers.1.input_layernorm.weight",
    ),
    "extra tensor": (
        "single",
        lambda f: _change(f, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros((2, 2))})),
        "not of this architecture: model.layers.2.mlp.up_proj.weight",
    ),
    "misshapen": ("single", lambda f: _change(f, _shape), "up_proj.weight 95x64 instead of 96x64"),
    "NaN": ("single", lambda f: _change(f, _nan), "model.norm.weight contains NaN or infinity"),
    "NaN in bfloat16": ("single", lambda f: _change(f, _nan_bfloat16), "lm_head.weight contains NaN or infinity"),
    "quantised": ("single", lambda f: _change(f, _quantised), "model.norm.weight is stored as I8"),
    "not JSON": ("single", lambda f: (f / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "no config": ("single", lambda f: (f / "config.json").unlink(), "has no config.json"),
}  # fmt: skip


@pytest.mark.parametrize(("folder", "damage", "message"), WRONG_FILES.values(), ids=WRONG_FILES, indirect=["folder"])
def test_wrong_files(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        HfFolder(folder).params()


@pytest.mark.parametrize("folder", ["sharded"], indirect=True)
def test_duplicate_tensors(folder):
    one = sorted(folder.glob("*.safetensors"))[0]
    save_file({**load_file(one), "model.norm.weight": np.ones(64, np.float32)}, one)
    with pytest.raises(UserError, match=r"has duplicate tensors: model\.norm\.weight"):
        HfFolder(folder)


@pytest.mark.parametrize("folder", ["single"], indirect=True)
def test_what_old_checkpoints_hold_beside(folder):
    unused = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for i in range(2)}
    _change(folder, lambda tensors: tensors.update(unused))
    HfFolder(folder)


def test_tied_output_that_is_a_copy(tmp_path):
    hf_models.make("qwen2", tmp_path, tie_word_embeddings=True)
    embedding = load_file(tmp_path / SINGLE)["model.embed_tokens.weight"]
    _change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding.copy()}))
    HfFolder(tmp_path)
    _change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(UserError, match="says tie_word_embeddings=true, but the files have an lm_head.weight"):
        HfFolder(tmp_path)


LLAMA = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip

WRONG_CONFIGS = {
    "model_type='lama' is not an architecture that lcx supports; did you mean 'llama'": {"model_type": "lama"},
    "model_type=None is not an architecture": {"model_type": None},
    r"architectures=\['LlamaForSequenceClassification'\] is not": {"architectures": ["LlamaForSequenceClassification"]},
    r"architectures=5 is not supported; expected \['LlamaForCausalLM'\]": {"architectures": 5},
    r"model_type=\['llama'\] is not an architecture": {"model_type": ["llama"]},
    "rope_parameters='x' .* is not a mapping": {"rope_parameters": "x"},
    "disagree; keep only one": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "rope_theta='1e4' .* is not a number": {"rope_theta": "1e4"},
    "theta=0.0": {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
    "rms_norm_eps=-1.0 must be a number above 0": {"rms_norm_eps": -1.0},
    "max_position_embeddings=1,000,000,000,000 does not fit into an int32": {"max_position_embeddings": 10**12},
    "quantization_config=.* is not supported; use the original checkpoint": {"quantization_config": {"bits": 4}},
    "dual_chunk_attention_config=.* is not supported": {"dual_chunk_attention_config": {"chunk_size": 1}},
    "sliding_window=32 is not supported for llama": {"sliding_window": 32},
    "is_encoder_decoder=True is not supported; expected False": {"is_encoder_decoder": True},
    "hidden_size is missing": {"hidden_size": None},
    "hidden_size='64': expected int": {"hidden_size": "64"},
    "num_hidden_layers=0 must be at least 1": {"num_hidden_layers": 0},
    "tie_word_embeddings=1: expected bool": {"tie_word_embeddings": 1},
    "hidden_act='swiglu' is not a supported activation": {"hidden_act": "swiglu"},
    "num_kv_heads=3 must divide num_heads=4": {"num_key_value_heads": 3},
    "rope_type='lynear' .* is unknown": {"rope_scaling": {"rope_type": "lynear", "factor": 2.0}},
    "rope_type='llama3' .* needs the key": {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
    r"layer_types has 'chunked_attention'": {"model_type": "qwen3", "layer_types": ["full_attention", "chunked_attention"]},
    "layer_types lists 1 layers, but num_hidden_layers=2": {"model_type": "qwen3", "layer_types": ["full_attention"]},
}


@pytest.mark.parametrize(("message", "change"), WRONG_CONFIGS.items())
def test_wrong_configs(message, change):
    with pytest.raises(UserError, match=message):
        configs.read({**LLAMA, **change})


def test_keys_of_other_days_say_the_same():
    """Before transformers 5 rotary settings stood under other keys."""
    older = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    newer = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}
    assert _turns({**LLAMA, **older}) == _turns({**LLAMA, **newer})
    gemma = {**LLAMA, "model_type": "gemma3_text"}
    older = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    newer = {"rope_parameters": {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    more = {"num_hidden_layers": 6}
    assert _turns({**gemma, **more, **older}) == _turns({**gemma, **more, **newer})


SMALL = dict(vocab_size=256, model_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=96)

UNWRITABLE = {
    "model.sinks": (dict(sinks=True), "rope"),
    "model.gated": (dict(gated=False), "rope"),
    "positional scheme 'alibi' has no Hugging Face": ({}, "alibi"),
    "yarn.variant='paper'": ({}, "yarn:factor=4,original_length=64,variant=paper"),
}


@pytest.mark.parametrize(("message", "case"), UNWRITABLE.items())
def test_models_that_no_family_has(message, case, tmp_path):
    changes, spec = case
    with pytest.raises(UserError, match=message):
        save(tmp_path / "out", {}, ModelConfig(**{**SMALL, **changes}), {"global": from_config(spec)}, 256, "float32")
    assert not (tmp_path / "out").exists()


WRITABLE = {
    "llama": (dict(norm_eps=1e-6), "rope:theta=350"),
    "qwen2": (dict(qkv_bias=True), "ntk:factor=8,original_length=64"),
    "qwen3": (dict(qk_norm="head"), "linear:original_length=64"),
    "mistral": (dict(pattern=("local",), window=32), "dynamic:original_length=64"),
    "olmo2": (dict(qk_norm="full", pre_norm=False, post_norm=True), "llama3:factor=4,original_length=64"),
    "smollm3": (dict(pattern=("global", "nope")), "rope:theta=350"),
}


@pytest.mark.parametrize("family", WRITABLE)
def test_models_trained_by_lcx_find_a_family(family):
    """A config.json is found from the model alone, and a reader of it computes the same angles."""
    changes, spec = WRITABLE[family]
    model = ModelConfig(**{**SMALL, **changes})
    schemes = {kind: from_config("nope" if kind == "nope" else spec) for kind in model.kinds}
    values = configs.write(model, schemes, 256, "float32")
    found = configs.read(values)
    assert found.model_type == family
    for kind, read in zip(model.kinds, found.model.kinds, strict=True):
        assert _close(schemes[kind], found.schemes[read], model)


def _turns(values):
    found = configs.read(values)
    return {kind: _fixed_point(scheme, found.model) for kind, scheme in found.schemes.items()}


def _close(scheme, other, model):
    """Angles equal up to the rounding of a theta to float64."""
    one, two = (_fixed_point(x, model) for x in (scheme, other))
    return len(one) == len(two) and all(abs(a - b) <= 1e-14 * a for a, b in zip(one, two, strict=True))


def _fixed_point(scheme, model):
    """Turns per position of every pair, in units of 2**-64."""
    rotations = scheme.buffers(model.heads, 256).get("rotations", {})
    return [(int(hi) << 32) + int(lo) for rotation in rotations.values() for hi, lo in zip(rotation.hi, rotation.lo, strict=True)]
