"""Adapters against peft: the same logits both ways, and the same tensors in the files."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from lcx.adapters import lora
from lcx.adapters.lora import LoraConfig
from lcx.core.errors import UserError
from lcx.core.param_spec import initialize
from lcx.core.trees import paths
from lcx.interop.folder import HfFolder
from lcx.interop.peft import PeftFolder
from lcx.interop.peft_save import Adapted, save
from lcx.model.architecture import build_architecture
from lcx.model.execution import ExecutionConfig
from lcx.model.loss import logits
from lcx.model.params import specs
from lcx.model.transformer import hidden_states
from tests.interop import hf_models
from tests.quick import mostly_slow

ATTENTION = ("layers/attention/(query|key|value|out)/",)
LLAMA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """model_type -> (folder, changes), made once."""
    made = {}

    def get(model_type, **changes):
        key = (model_type, json.dumps(changes))
        if key not in made:
            folder = tmp_path_factory.mktemp(model_type)
            hf_models.make(model_type, folder, num_hidden_layers=2, **changes)
            made[key] = folder
        return made[key]

    return get


def our_logits(source, params, ids):
    arch, buffers = build_architecture(source.described.model, ExecutionConfig(), source.described.schemes, ids.shape[1])
    with jax.default_matmul_precision("highest"):
        return np.asarray(logits(params, hidden_states(params, buffers, arch, hf_models.batch(ids))[0], arch.config))


def peft_model(base, adapter):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def adapted(source, config, seed=0):
    """The base's parameters, random adapters, and other values of what is trained in full."""
    described = source.described
    table = lora.specs(specs(described.model, described.schemes, described.length), config, described.model.tied_embeddings)
    rng, base = np.random.default_rng(seed), dict(paths(source.params("float32")))
    drawn = dict(paths(initialize(table, jax.random.key(seed))))
    flat, trained = {}, set()
    for path, leaf in drawn.items():
        x = np.array(base.get(path, leaf))
        if path.endswith(("/a", "/b")):
            x = rng.normal(size=x.shape, scale=0.2).astype(np.float32)
        elif lora.is_trained(path, config) and path in base:
            x = x * (1 + 0.1 * rng.normal(size=x.shape).astype(np.float32))
        flat[path] = jnp.asarray(x)
        if lora.is_trained(path, config):
            trained.add(path)
    tree = lora.start(jax.tree.unflatten(jax.tree.structure(initialize(table, jax.random.key(0))), list(flat.values())))
    return jax.tree_util.tree_map_with_path(lambda path, x: x * 1.1 if path[-1].key == "magnitude" else x, tree), trained


OURS = {
    "llama": ("llama", LLAMA, LoraConfig(rank=4, alpha=6.0)),
    "llama-rslora-dora": (
        "llama", LLAMA, LoraConfig(rank=4, targets=("attention", "mlp", "head"), ranks=(("mlp/up", 2),), alphas=(("key", 3.0),),
        rank_stabilized=True, dora=True),
    ),
    "llama-embeddings-norms": ("llama", LLAMA, LoraConfig(rank=4, targets=("embed", "query"), train=("norm", "mlp/up"))),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, LoraConfig(rank=4, train=("embed", "final_norm"))),
    "llama-biases": ("llama", {"attention_bias": True}, LoraConfig(rank=4, targets=("query",), train=("query/bias",))),
    "qwen2": ("qwen2", {}, LoraConfig(rank=4, targets=ATTENTION, train=("bias",))),
    "qwen2-one-kernel-in-full": ("qwen2", {}, LoraConfig(rank=4, targets=("out",), train=("key/kernel", "key/bias"))),
    "gemma3": ("gemma3_text", {}, LoraConfig(rank=4, targets=("attention", "mlp"), train=("query_norm",))),
    "mixtral": ("mixtral", {}, LoraConfig(rank=4, targets=ATTENTION, dora=True)),
    "phi3": ("phi3", {}, LoraConfig(rank=4, targets=("query", "value", "mlp/up"), alphas=(("value", 3.0),))),
    "phi3-dora": ("phi3", {}, LoraConfig(rank=4, targets=("query", "key", "value"), dora=True)),
}  # fmt: skip


@pytest.mark.parametrize("case", mostly_slow(OURS, ["qwen2", "phi3-dora"]))
def test_an_adapter_of_ours_in_peft(bases, tmp_path, case):
    model_type, changes, config = OURS[case]
    base = bases(model_type, **changes)
    source = HfFolder(base)
    params, trained = adapted(source, config)
    save(tmp_path / "out", Adapted(params, frozenset(trained), config.rank_stabilized), source.described, base, {})
    ids = hf_models.tokens(40)
    ours, theirs = our_logits(source, params, ids), hf_models.torch_logits(peft_model(base, tmp_path / "out"), ids)
    assert np.max(np.abs(ours - our_logits(source, source.params("float32"), ids))) > 0.1
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * max(1, np.max(np.abs(ours))))
    # What peft itself writes for these settings has the same tensors.
    settings = peft.LoraConfig.from_pretrained(tmp_path / "out")
    settings.inference_mode = False
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "theirs"))
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}
    # And what we wrote, we read.
    again = PeftFolder(tmp_path / "out").unfolded()
    np.testing.assert_allclose(our_logits(source, again, ids), our_logits(source, params, ids), atol=1e-5)


THEIRS = {
    "llama": ("llama", LLAMA, dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])),
    "llama-patterns": (
        "llama", LLAMA, dict(r=4, target_modules=r".*\.(q|k|up|down)_proj", use_rslora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 7, "up_proj": 2}, alpha_pattern={"k_proj": 3, r".*mlp\.down_proj": 20}),
    ),
    "llama-dora": (
        "llama", LLAMA, dict(r=4, target_modules=["q_proj", "o_proj", "lm_head"], use_dora=True, layers_to_transform=[1],
        modules_to_save=["input_layernorm"]),
    ),
    "llama-embeddings": ("llama", LLAMA, dict(r=4, target_modules=["embed_tokens", "q_proj"], modules_to_save=["norm"])),
    "llama-tied": (
        "llama", {"tie_word_embeddings": True}, dict(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"],
        ensure_weight_tying=True),
    ),
    "qwen2-biases": ("qwen2", {}, dict(r=4, target_modules=["q_proj", "k_proj"], bias="lora_only")),
    "qwen2-all-biases": ("qwen2", {}, dict(r=4, target_modules=["q_proj"], bias="all")),
    "gemma3": ("gemma3_text", {}, dict(r=4, target_modules="all-linear")),
    "mixtral": ("mixtral", {}, dict(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])),
    "phi3": ("phi3", {}, dict(r=4, target_modules=["qkv_proj", "gate_up_proj"], use_dora=True)),
}  # fmt: skip


def made_by_peft(base, folder, settings):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.7).add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("case", mostly_slow(THEIRS, ["llama-patterns", "qwen2-biases", "phi3"]))
def test_an_adapter_of_pefts_here(bases, tmp_path, case):
    model_type, changes, settings = THEIRS[case]
    base = bases(model_type, **changes)
    theirs = made_by_peft(base, tmp_path, settings)
    ids = hf_models.tokens(40)
    source = PeftFolder(tmp_path)
    wanted = hf_models.torch_logits(theirs, ids)
    unfolded = source.unfolded()
    tolerance = 1e-5 * max(1, np.max(np.abs(wanted)))
    np.testing.assert_allclose(our_logits(source, unfolded, ids), wanted, atol=tolerance)
    np.testing.assert_allclose(our_logits(source, source.params("float32"), ids), wanted, atol=tolerance)
    assert np.max(np.abs(our_logits(source, source.base.params("float32"), ids) - wanted)) > 0.1


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_single_experts(bases, tmp_path, dora):
    """As peft writes them for models whose experts are modules."""
    base, rng = bases("mixtral"), np.random.default_rng(0)
    stored = load_file(base / "model.safetensors")
    tensors, wanted = {}, dict(stored)
    for expert, what, rank in ((0, "w1", 2), (3, "w1", 4), (1, "w2", 4)):
        module = f"model.layers.1.block_sparse_moe.experts.{expert}.{what}"
        kernel = stored[f"{module}.weight"]
        a, b = (rng.normal(size=size).astype(np.float32) for size in ((rank, kernel.shape[1]), (kernel.shape[0], rank)))
        changed = kernel + 6 / rank * b @ a
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        if dora:
            magnitude = rng.random(len(kernel)).astype(np.float32)
            tensors[f"base_model.model.{module}.lora_magnitude_vector"] = magnitude
            changed = magnitude[:, None] * changed / np.linalg.norm(changed, axis=1, keepdims=True)
        wanted[f"{module}.weight"] = changed
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_dora": dora, "rank_pattern": {r"experts\.0\.w1": 2}}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    shutil.copytree(base, tmp_path / "folded")
    save_file({name: np.ascontiguousarray(x) for name, x in wanted.items()}, tmp_path / "folded" / "model.safetensors")
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5),
        PeftFolder(tmp_path / "adapter").params("float32"), HfFolder(tmp_path / "folded").params("float32"),
    )  # fmt: skip


@pytest.fixture
def adapter(bases, tmp_path):
    made_by_peft(bases("llama", **LLAMA), tmp_path / "adapter", dict(r=4, target_modules=["q_proj", "v_proj"]))
    return tmp_path / "adapter"


def changed(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported; lcx reads adapters of type 'LORA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base's weights too; convert the adapter with peft"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported; fold the adapter with peft"),
        ({"target_parameters": ["experts"]}, r"target_parameters=\['experts'\] is not supported"),
        ({"base_model_name_or_path": "meta/none"}, "base_model_name_or_path='meta/none' is not a model's folder here; fetch that"),
        ({"r": 5}, r"q_proj.lora_A.weight is 4x64, but by the base and adapter_config.json it should be 5x64"),
        ({"r": 0}, "r=0 must be a number above 0"),
        ({"bias": "some"}, "bias='some' is unknown"),
    ],
    ids=str,
)
def test_settings_that_lcx_does_not_compute(adapter, values, said):
    with pytest.raises(UserError, match=said):
        PeftFolder(changed(adapter, **values))


def test_files_that_do_not_belong(adapter, bases, tmp_path):
    other = bases("llama", **{**LLAMA, "hidden_size": 32})
    with pytest.raises(UserError, match="the adapter is of another model or of another rank"):
        PeftFolder(adapter, other)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(name for name in tensors if "lora_B" in name)
    save_file({name: x for name, x in tensors.items() if name != first}, file)
    with pytest.raises(UserError, match="lora_A.weight but not its lora_B.weight; the file is incomplete"):
        PeftFolder(adapter)
    save_file({**tensors, "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": tensors[first]}, file)
    with pytest.raises(UserError, match="not a module of the base; was the adapter trained for another model"):
        PeftFolder(adapter)
    save_file({**tensors, first: np.full_like(tensors[first], np.nan)}, file)
    with pytest.raises(UserError, match="contains NaN or infinity"):
        PeftFolder(adapter).unfolded()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        PeftFolder(adapter)
    file.unlink()
    shutil.copy(__file__, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="is a pickle"):
        PeftFolder(adapter)


def test_a_table_that_is_tied_here_and_not_there(bases, tmp_path):
    settings = dict(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    made_by_peft(bases("llama", tie_word_embeddings=True), tmp_path, settings)
    with pytest.raises(UserError, match="the base has one table for both; train it with ensure_weight_tying in peft"):
        PeftFolder(tmp_path)


def test_what_peft_cannot_express(bases, tmp_path):
    source = HfFolder(bases("mixtral"))
    params, trained = adapted(source, LoraConfig(rank=2, targets=("mlp/up",)))
    with pytest.raises(UserError, match="transformers stores experts in one tensor that peft does not name"):
        save(tmp_path / "out", Adapted(params, frozenset(trained)), source.described, source.folder, {})
    source = HfFolder(bases("qwen2"))
    params, trained = adapted(source, LoraConfig(rank=2, targets=("query", "value"), train=("query/bias",)))
    with pytest.raises(UserError, match="peft can save all, those of adapted modules or none"):
        save(tmp_path / "out", Adapted(params, frozenset(trained)), source.described, source.folder, {})
    assert not list(tmp_path.iterdir())


def test_a_base_that_is_not_the_adapters_own(bases, tmp_path, capsys):
    source = HfFolder(bases("llama", **LLAMA))
    params, trained = adapted(source, LoraConfig(rank=2, targets=("query",)))
    made = Adapted(params, frozenset(trained))
    other = bases("llama", **{**LLAMA, "intermediate_size": 48})
    with pytest.raises(
        UserError, match="were trained over a model with mlp_dim=[0-9]+, and .* has mlp_dim=48; name a folder of their"
    ):
        save(tmp_path / "out", made, source.described, other, {})
    save(tmp_path / "out", made, source.described, source.folder, {})
    assert "warning" not in capsys.readouterr().err
    shutil.copytree(source.folder, tmp_path / "changed")
    file = tmp_path / "changed" / "model.safetensors"
    save_file({name: 1.5 * x for name, x in load_file(file).items()}, file, metadata={"format": "pt"})
    save(tmp_path / "over", made, source.described, tmp_path / "changed", {})
    said = " ".join(capsys.readouterr().err.split())
    assert "is not the base that the adapters were trained over: lm_head.weight differs by 50%" in said
