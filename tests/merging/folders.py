"""Small random Llamas in Hugging Face folders, and merges of them."""

import json

import numpy as np
import yaml
from safetensors.numpy import load_file, save_file

from lcx.interop import hf_config, weights
from lcx.interop.shards import write
from lcx.merging.merge import Merge
from lcx.model.params import specs

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip

TOKENIZER = {
    "version": "1.0", "added_tokens": [{"id": 39, "content": "<end>", "special": True}],
    "model": {"type": "BPE", "vocab": {chr(97 + i): i for i in range(26)}, "merges": []},
}  # fmt: skip

Q = "model.layers.{}.self_attn.q_proj.weight"
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def make(folder, seed=0, near=None, scale=0.1, dtype="float32", tokenizer=None, max_bytes=1 << 30, **changes):
    """A random model, or a fine-tune `near` the model of another folder."""
    values = {**CONFIG, "dtype": dtype, **changes}
    described = hf_config.read(values)
    slots = weights.slots(specs(described.model, described.schemes, 64), described.family, values["num_hidden_layers"])
    rng = np.random.default_rng(seed)
    start = load(near) if near else None
    tensors = {}
    for name, parts in slots.items():
        noise = rng.standard_normal(parts[0].tensor_shape).astype(np.float32)
        tensors[name] = (start[name] + scale * noise if start else noise).astype(np.dtype(dtype))
    folder.mkdir(parents=True)
    write(folder, {name: tensor.nbytes for name, tensor in tensors.items()}, tensors.__getitem__, max_bytes)
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 39}))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder


def load(folder):
    """All tensors of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def change(folder, name, array):
    """Put another tensor in the place of one (None: take it away)."""
    tensors = load(folder)
    tensors.pop(name) if array is None else tensors.__setitem__(name, array)
    save_file(tensors, folder / "model.safetensors")


def describe(path, **values):
    """A YAML file."""
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def merge(tmp_path, name="out", max_bytes=1 << 30, **values):
    """A merge that these values describe, written to a folder."""
    out = tmp_path / name
    Merge(describe(tmp_path / f"{name}.yml", **values)).write(out, max_bytes)
    return out
