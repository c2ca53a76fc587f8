"""Every family against transformers: the same logits and gradients from the same files, and the same files back."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers

from lcx.core.errors import UserError
from lcx.interop import hf_config
from lcx.interop.families import FAMILIES
from lcx.interop.folder import HfFolder, keep, save
from lcx.interop.hf_config import read_file
from lcx.interop.shards import Shards
from lcx.model.architecture import build_architecture
from lcx.model.execution import ExecutionConfig
from lcx.model.loss import loss_sums
from lcx.model.transformer import hidden_states
from lcx.positions.query_scaling import QueryScaling
from lcx.positions.xpos import Xpos
from tests.interop import hf_models
from tests.interop.hf_models import TRAINED
from tests.quick import mostly_slow

FAR = 4 * TRAINED
"""Tokens of a row: four times what the small models say they were trained for."""

YARN = {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0, "original_max_position_embeddings": TRAINED}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": TRAINED,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 5e3, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 5e3}
SCALED = {"llama_4_scaling_beta": 0.2}


def longrope(pairs: int) -> dict:
    lists = {"short_factor": [1 + 0.05 * i for i in range(pairs)], "long_factor": [1 + 0.3 * i for i in range(pairs)]}
    return {"rope_type": "longrope", "rope_theta": 5e3, "original_max_position_embeddings": TRAINED, **lists}


def two(full: dict) -> dict:
    """Gemma 3's two rotaries."""
    return {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}


CASES = {
    "llama": ("llama", dict(rope_parameters=PLAIN)),
    "llama-mha-tied": ("llama", dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "llama-mqa-biases": ("llama", dict(num_key_value_heads=1, attention_bias=True, mlp_bias=True)),
    "llama-llama3-sharded": ("llama", dict(rope_parameters=LLAMA3, shard="60KB", max_position_embeddings=FAR)),
    "llama-linear": ("llama", dict(rope_parameters=LINEAR)),
    "llama-dynamic": ("llama", dict(rope_parameters=DYNAMIC)),
    "llama-yarn": ("llama", dict(rope_parameters=YARN, max_position_embeddings=FAR, head_dim=24)),
    "llama-longrope": ("llama", dict(rope_parameters=longrope(8), max_position_embeddings=FAR)),
    "mistral": ("mistral", dict(rope_parameters=PLAIN, head_dim=24)),
    "mistral-full": ("mistral", dict(sliding_window=None, rope_parameters=YARN, max_position_embeddings=FAR)),
    "ministral3": ("ministral3", dict(rope_parameters={**YARN, **SCALED}, max_position_embeddings=FAR, head_dim=24)),
    "ministral3-tied": (
        "ministral3",
        dict(rope_parameters={**PLAIN, **SCALED, "original_max_position_embeddings": 16}, tie_word_embeddings=True, head_dim=16),
    ),
    "qwen2": ("qwen2", dict(rope_parameters=PLAIN)),
    "qwen2-yarn-tied": (
        "qwen2",
        dict(use_sliding_window=False, tie_word_embeddings=True, rope_parameters=YARN, max_position_embeddings=FAR),
    ),
    "qwen3": ("qwen3", dict(rope_parameters=PLAIN, attention_bias=True)),
    "qwen3-yarn-mqa-sharded": (
        "qwen3",
        dict(rope_parameters=YARN, num_key_value_heads=1, shard="60KB", max_position_embeddings=FAR),
    ),
    "gemma2": ("gemma2", dict(rope_parameters=PLAIN)),
    "gemma2-mha": ("gemma2", dict(num_key_value_heads=4, final_logit_softcapping=None, hidden_activation="gelu")),
    "gemma3": ("gemma3_text", dict(rope_parameters=two(PLAIN))),
    "gemma3-linear": ("gemma3_text", dict(rope_parameters=two(LINEAR), num_key_value_heads=1, final_logit_softcapping=20.0)),
    "phi3": ("phi3", dict(rope_parameters=PLAIN)),
    "phi3-longrope-window": (
        "phi3",
        dict(rope_parameters=longrope(8), max_position_embeddings=FAR, sliding_window=40, num_key_value_heads=4, shard="60KB"),
    ),
    "phi3-partial": ("phi3", dict(rope_parameters={**PLAIN, "partial_rotary_factor": 0.5})),
    "olmo2": ("olmo2", dict(rope_parameters=PLAIN)),
    "olmo2-yarn-mha": ("olmo2", dict(rope_parameters=YARN, num_key_value_heads=4, max_position_embeddings=FAR)),
    "smollm3": ("smollm3", dict(rope_parameters=PLAIN, num_hidden_layers=5)),
    "smollm3-window": (
        "smollm3",
        dict(
            use_sliding_window=True, sliding_window=24, no_rope_layers=[1, 0, 1, 0], attention_bias=True,
            tie_word_embeddings=False,
        ),
    ),
    "mixtral": ("mixtral", dict(rope_parameters=PLAIN)),
    "mixtral-window-yarn": ("mixtral", dict(sliding_window=24, rope_parameters=YARN, max_position_embeddings=FAR, shard="200KB")),
    "qwen3-moe": ("qwen3_moe", dict(rope_parameters=PLAIN)),
    "qwen3-moe-window-sums": (
        "qwen3_moe",
        dict(use_sliding_window=True, sliding_window=24, norm_topk_prob=False, attention_bias=True, tie_word_embeddings=True),
    ),
}  # fmt: skip


def test_every_family_has_a_case():
    assert {model_type for model_type, _ in CASES.values()} == set(FAMILIES)


SLOW = (
    "llama", "llama-mha-tied", "llama-mqa-biases", "llama-linear", "llama-dynamic", "llama-yarn", "llama-longrope", "mistral-full",
    "qwen2-yarn-tied", "qwen3",
    "gemma2-mha", "gemma3-linear", "phi3", "phi3-partial", "olmo2-yarn-mha", "smollm3-window", "mixtral-window-yarn",
    "qwen3-moe-window-sums",
)  # fmt: skip
"""Further forms of families, for `make test-all`; what is special in them is special in another one that is left."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_import_and_export(name, tmp_path):
    model_type, changes = CASES[name]
    source, back = tmp_path / "source", tmp_path / "back"
    model = hf_models.make(model_type, source, **changes)
    ids = hf_models.tokens(FAR)
    reference = hf_models.torch_logits(model, ids)
    assert np.abs(hf_models.lcx_logits(source, ids) - reference).max() <= 2e-5 * max(1, np.abs(reference).max())

    given = HfFolder(source)
    described = given.described
    save(back, given.params(), described.model, described.schemes, described.length, "float32", source, 60_000)
    assert len(Shards(back).files) > 1
    assert _tensors(back) == _tensors(source)
    with hf_models.float64_rotary():
        again = transformers.AutoModelForCausalLM.from_pretrained(back, attn_implementation="eager").eval()
    assert np.array_equal(hf_models.torch_logits(again, ids), reference)
    assert read_file(back) == described


def test_a_model_without_a_family_gets_one_that_has_its_positions(tmp_path):
    hf_models.make("gemma3_text", tmp_path, rope_parameters=two(PLAIN))
    given = read_file(tmp_path)
    values = hf_config.write(given.model, given.schemes, given.length, "float32")
    assert values["model_type"] == "gemma3_text"
    found = hf_config.read(values)
    assert (found.model, found.schemes) == (given.model, given.schemes)
    with pytest.raises(UserError) as refused:
        hf_config.write(given.model, {kind: Xpos() for kind in given.model.kinds}, given.length, "float32")
    assert str(refused.value).count("xpos has no Hugging Face rope_type") == 1


def test_a_llama_with_scaled_queries_is_written_as_the_family_that_has_them(tmp_path):
    """Llama itself would ignore them, as it does in transformers where its config has the key."""
    source, scaled = tmp_path / "source", tmp_path / "scaled"
    hf_models.make("llama", source, rope_parameters=PLAIN)
    given = HfFolder(source)
    found, temperature = given.described, QueryScaling("ministral", 0.3, 16)
    schemes = {kind: dataclasses.replace(scheme, temperature=temperature) for kind, scheme in found.schemes.items()}
    save(scaled, given.params(), found.model, schemes, found.length, "float32", source)
    values = json.loads((scaled / "config.json").read_text())
    assert (values["model_type"], values["architectures"]) == ("ministral3", ["Ministral3ForCausalLM"])
    assert values["llama_4_scaling"] == {"beta": 0.3, "original_max_position_embeddings": 16}
    with hf_models.float64_rotary():
        model = transformers.AutoModelForCausalLM.from_pretrained(scaled, attn_implementation="eager").eval()
    ids = hf_models.tokens(FAR)
    reference, plain = hf_models.torch_logits(model, ids), hf_models.lcx_logits(source, ids)
    assert np.abs(hf_models.lcx_logits(scaled, ids) - reference).max() <= 2e-5 * max(1, np.abs(reference).max())
    assert np.abs(plain[:, :16] - reference[:, :16]).max() <= 2e-5 and np.abs(plain - reference).max() > 0.1

    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] |= {"llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 16}
    assert all(scheme.temperature is None for scheme in hf_config.read(config).schemes.values())
    with pytest.raises(UserError, match="rope_parameters has no llama_4_scaling_beta"):
        hf_config.read({**values, "rope_parameters": PLAIN, "rope_scaling": None})


@pytest.mark.parametrize("name", mostly_slow(["llama-llama3-sharded", "qwen2", "qwen3"], ["qwen3"]))
def test_gradients(name, tmp_path):
    model_type, changes = CASES[name]
    # torch gives the row of a padding token no gradient.
    model = hf_models.make(model_type, tmp_path, **changes, pad_token_id=None)
    ids = hf_models.tokens(FAR // 2)
    labels = torch.tensor(ids).long()
    with hf_models.float64_rotary():
        model(labels, labels=labels).loss.backward()
    wanted = {key: parameter.grad.numpy() for key, parameter in model.named_parameters()}

    source = HfFolder(tmp_path)
    arch, buffers = build_architecture(source.described.model, ExecutionConfig(), source.described.schemes, ids.shape[1])
    batch = hf_models.batch(ids)

    def loss(params):
        sums = loss_sums(params, hidden_states(params, buffers, arch, batch)[0], batch, arch)
        return sums.nll / sums.weight

    found = jax.jit(jax.grad(loss))(source.params())
    out = tmp_path / "gradients"
    save(out, found, source.described.model, source.described.schemes, source.described.length, "float32", tmp_path)
    tensors = Shards(out)
    assert set(tensors.shapes) == set(wanted)
    for key, gradient in wanted.items():
        error, largest = np.abs(tensors.read(key) - gradient).max(), np.abs(gradient).max()
        assert error <= 1e-4 * largest, key


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_bfloat16_is_kept_bit_by_bit(model_type, tmp_path):
    source, back = tmp_path / "source", tmp_path / "back"
    hf_models.make(model_type, source).bfloat16().save_pretrained(source)
    given = HfFolder(source)
    assert given.dtype == "bfloat16"
    described = given.described
    # Through float32, as a run holds its weights.
    save(back, given.params("float32"), described.model, described.schemes, described.length, "bfloat16", source)
    assert _tensors(back) == _tensors(source)


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(fsdp=2, tensor=2, context=2)])
def test_read_onto_a_mesh(sizes, tmp_path):
    from lcx.core.mesh import MeshConfig, make_mesh

    hf_models.make("phi3", tmp_path, shard="60KB")
    source, mesh = HfFolder(tmp_path), make_mesh(MeshConfig(**sizes))
    whole, split = source.params(), source.params(mesh=mesh)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), whole, split)))
    kernel = split["layers"]["mlp"]["up"]["kernel"]
    assert len({shard.data.shape for shard in kernel.addressable_shards}) == 1
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size


def test_what_stands_beside_the_weights_is_kept(tmp_path):
    hf_models.make("llama", tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    keep(tmp_path / "source", tmp_path / "kept")
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "checksums.json"}


def _tensors(folder):
    shards = Shards(folder)
    return {name: shards.read(name).tobytes() for name in sorted(shards.shapes)}
