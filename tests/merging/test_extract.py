"""What a fine-tune adds, extracted and laid over its base and over a sibling: against the fine-tune itself, numpy and peft."""

import json
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from lcx.core import manifest
from lcx.core.errors import UserError
from lcx.interop.peft import PeftFolder
from lcx.interop.shards import Shards
from lcx.merging.apply import Application
from lcx.merging.extract import Extraction, show
from tests.interop import hf_models
from tests.interop.test_peft import made_by_peft, our_logits
from tests.merging.folders import merge
from tests.quick import mostly_slow

ROPE = {"rope_type": "default", "rope_theta": 5e3}
LONGER = {"rope_parameters": {"rope_type": "default", "rope_theta": 4e5}, "rope_theta": 4e5, "max_position_embeddings": 1024}
QUERY = "model.layers.1.self_attn.q_proj.weight"


def tensors(folder):
    shards = Shards(folder)
    return {name: shards.read(name) for name in shards.shapes}


def rewritten(source, out, change, dtype=np.float32, **values):
    """A copy of a model's folder with other numbers, and other values in its config.json."""
    shutil.copytree(source, out)
    found = {name: change(name, x.astype(np.float32)).astype(dtype) for name, x in tensors(source).items()}
    save_file(found, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **values}))
    return out


def low_rank(rank, seed=0, only=("self_attn", "up_proj")):
    """A change of a rank on some matrices, and a small one on norms and embeddings."""
    rng = np.random.default_rng(seed)

    def change(name, x):
        if any(part in name for part in only):
            return x + 0.1 * rng.normal(size=(x.shape[0], rank)) @ rng.normal(size=(rank, x.shape[1]))
        return x * (1 + 0.05 * rng.normal(size=x.shape)) if x.ndim == 1 or "embed" in name else x

    return change


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, a fine-tune of it for longer rows, and a sibling that was fine-tuned otherwise."""
    folder = tmp_path_factory.mktemp("models")
    hf_models.make("llama", folder / "base", num_hidden_layers=2, rope_parameters=ROPE)
    rewritten(folder / "base", folder / "tuned", low_rank(3), **LONGER)
    rewritten(folder / "base", folder / "sibling", low_rank(5, seed=1, only=("mlp",)))
    return folder


def extracted(models, out, rank=None, energy=None, embed=False):
    return Extraction(str(models / "base"), str(models / "tuned")).adapter(out, rank, energy, embed)


def applied(delta, target, out, **settings):
    Application(str(delta), str(target), **settings).write(out)
    return tensors(out)


def close(got, want, tolerance=1e-5):
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("embed", [False, True])
def test_an_adapter_of_sufficient_rank_gives_back_the_fine_tune(models, tmp_path, embed):
    found = extracted(models, tmp_path / "adapter", energy=1 - 1e-9, embed=embed)
    ranks = {one.module: one.rank for one in found}
    assert {rank for module, rank in ranks.items() if "embed" not in module} == {3}
    assert embed == ("model.embed_tokens" in ranks)
    close(applied(tmp_path / "adapter", models / "base", tmp_path / "out"), tensors(models / "tuned"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rope_theta"], config["max_position_embeddings"]) == (4e5, 1024)
    # peft reads the same, with the config.json beside it.
    settings = transformers.AutoConfig.from_pretrained(tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(models / "base", config=settings, attn_implementation="eager")
    ids = hf_models.tokens(40)
    ours = hf_models.torch_logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), ids)
    whole = transformers.AutoModelForCausalLM.from_pretrained(models / "tuned", attn_implementation="eager").eval()
    wanted = hf_models.torch_logits(whole, ids)
    np.testing.assert_allclose(ours, wanted, atol=1e-5 * np.max(np.abs(wanted)))


def test_a_rank_above_that_of_the_differences_is_said(models, tmp_path, capsys):
    found = extracted(models, tmp_path / "adapter", rank=9999)
    assert {one.rank for one in found} == {3}
    said = f"--rank=9999 is more than {len(found)} of {len(found)} differences have; their adapters have their rank"
    assert said in capsys.readouterr().out
    extracted(models, tmp_path / "other", rank=3)
    assert "is more than" not in capsys.readouterr().out


@pytest.mark.parametrize("asked", [{"rank": 2}, {"energy": 0.8}], ids=str)
def test_rank_energy_and_error_are_those_of_the_decomposition(models, tmp_path, asked, capsys):
    found = {one.module: one for one in extracted(models, tmp_path / "adapter", **asked)}
    base, tuned = (tensors(models / name)[QUERY].astype(np.float64) for name in ("base", "tuned"))
    squares = np.linalg.svd(tuned - base, compute_uv=False) ** 2
    shares = np.cumsum(squares) / squares.sum()
    one = found[QUERY.removesuffix(".weight")]
    assert one.rank == asked.get("rank", int(np.argmax(shares >= 0.8)) + 1)
    np.testing.assert_allclose(one.energy, shares[one.rank - 1], rtol=1e-5)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{one.module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    error = np.linalg.norm(tuned - base - b @ a) / np.linalg.norm(tuned - base)
    np.testing.assert_allclose(one.error, error, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(a), np.linalg.norm(b), rtol=1e-5)
    rows = json.loads((tmp_path / "adapter" / "extraction.json").read_text())
    assert {row["module"] for row in rows} == set(found)
    show(list(found.values()))
    assert "model.layers.*.self_attn.q_proj" in capsys.readouterr().out


def test_differences_give_back_bfloat16_bit_for_bit(models, tmp_path):
    for name in ("base", "tuned"):
        rewritten(models / name, tmp_path / name, lambda _, x: x, bfloat16)
    Extraction(str(tmp_path / "base"), str(tmp_path / "tuned")).full(tmp_path / "delta")
    got, want = applied(tmp_path / "delta", tmp_path / "base", tmp_path / "out"), tensors(tmp_path / "tuned")
    assert {name: x.tobytes() for name, x in got.items()} == {name: x.tobytes() for name, x in want.items()}
    assert not (tmp_path / "delta" / "config.json").exists()


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_sparse_differences_are_the_largest(models, tmp_path, share):
    Extraction(str(models / "base"), str(models / "tuned")).sparse(tmp_path / "delta", share)
    base, tuned = tensors(models / "base"), tensors(models / "tuned")
    want = {}
    for name, x in base.items():
        delta = tuned[name] - x
        count = int(np.ceil(share * delta.size))
        threshold = np.sort(np.abs(delta).reshape(-1))[delta.size - count]
        want[name] = x + np.where(np.abs(delta) >= threshold, delta, 0)
    close(applied(tmp_path / "delta", models / "base", tmp_path / "out"), want, 1e-6)


@pytest.mark.parametrize("form", ["adapter", "full"])
def test_a_sibling_gets_what_the_fine_tune_added(models, tmp_path, form):
    """What an adapter saves whole is added as a difference too, and a weight scales everything."""
    if form == "adapter":
        extracted(models, tmp_path / "delta", energy=1 - 1e-9)
    else:
        Extraction(str(models / "base"), str(models / "tuned")).full(tmp_path / "delta")
    base, tuned, sibling = (tensors(models / name) for name in ("base", "tuned", "sibling"))
    for weight in (1.0, 0.5):
        got = applied(tmp_path / "delta", models / "sibling", tmp_path / f"out{weight}", weight=weight)
        close(got, {name: x + np.float32(weight) * (tuned[name] - base[name]) for name, x in sibling.items()})


def test_an_adapter_without_its_base_replaces(models, tmp_path, capsys):
    extracted(models, tmp_path / "adapter", rank=3)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "gone"}))
    manifest.write(file.parent)
    got = applied(tmp_path / "adapter", models / "sibling", tmp_path / "out")
    np.testing.assert_array_equal(got["model.norm.weight"], tensors(models / "tuned")["model.norm.weight"])
    assert "so what it saves whole replaced the target's own" in " ".join(capsys.readouterr().err.split())


PEFTS = {
    "rslora": dict(r=4, target_modules="all-linear", use_rslora=True, alpha_pattern={"k_proj": 3}),
    "dora": dict(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, modules_to_save=["norm"]),
    "embeddings": dict(r=4, target_modules=["embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("case", mostly_slow(PEFTS, ["dora"]))
def test_an_adapter_of_pefts_is_folded_as_peft_does(models, tmp_path, case):
    theirs = made_by_peft(models / "base", tmp_path / "adapter", PEFTS[case])
    applied(tmp_path / "adapter", models / "base", tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    ids = hf_models.tokens(40)
    wanted = hf_models.torch_logits(theirs, ids)
    np.testing.assert_allclose(hf_models.torch_logits(again.eval(), ids), wanted, atol=1e-5 * np.max(np.abs(wanted)))
    # The reader that goes through lcx's parameters folds to the same.
    source = PeftFolder(tmp_path / "adapter")
    np.testing.assert_allclose(our_logits(source, source.params("float32"), ids), wanted, atol=1e-5 * np.max(np.abs(wanted)))


def test_whose_rotary_settings_count(models, tmp_path):
    extracted(models, tmp_path / "adapter", rank=1)
    other = rewritten(
        models / "base", tmp_path / "other", lambda _, x: x, rope_theta=7e4, rope_parameters={**ROPE, "rope_theta": 7e4}
    )
    with pytest.raises(UserError, match="has other rotary settings than the base of .*--rotary=delta .*or --rotary=target"):
        Application(str(tmp_path / "adapter"), str(other))
    for side, theta in (("delta", 4e5), ("target", 7e4)):
        found = Application(str(tmp_path / "adapter"), str(other), rotary=side).values
        assert found["rope_parameters"]["rope_theta"] == theta
    with pytest.raises(UserError, match="--rotary='both' is unknown"):
        Application(str(tmp_path / "adapter"), str(other), rotary="both")


def test_models_that_do_not_belong_together(models, tmp_path):
    hf_models.make("llama", tmp_path / "wide", num_hidden_layers=2, hidden_size=32, head_dim=16)
    hf_models.make("qwen2", tmp_path / "qwen", num_hidden_layers=2)
    base = str(models / "base")
    with pytest.raises(UserError, match="differ in hidden_size"):
        Extraction(base, str(tmp_path / "wide"))
    with pytest.raises(UserError, match="differ in model_type"):
        Extraction(base, str(tmp_path / "qwen"))
    with pytest.raises(UserError, match="there is nothing to extract"):
        Extraction(base, base).adapter(tmp_path / "out", 4, None)
    extracted(models, tmp_path / "adapter", rank=1)
    with pytest.raises(UserError, match="differ in hidden_size"):
        Application(str(tmp_path / "adapter"), str(tmp_path / "wide"))
    with pytest.raises(UserError, match="holds neither lcx_delta.json nor adapter_config.json"):
        Application(base, base)
    with pytest.raises(UserError, match="--weight=nan must be finite and not 0"):
        Application(str(tmp_path / "adapter"), base, weight=float("nan"))
    for name in ("config.json", "checksums.json"):
        (tmp_path / "adapter" / name).unlink()
    with pytest.raises(UserError, match="they are of different models"):
        Application(str(tmp_path / "adapter"), str(tmp_path / "wide"))


def test_a_broken_delta_leaves_nothing(models, tmp_path):
    Extraction(str(models / "base"), str(models / "tuned")).sparse(tmp_path / "delta", 0.1)
    file = tmp_path / "delta" / "sparse.safetensors"
    stored = load_file(file)
    stored[f"{QUERY}.values"][3] = np.nan
    save_file(stored, file)
    with pytest.raises(UserError, match="sparse.safetensors has other contents than were written"):
        applied(tmp_path / "delta", models / "base", tmp_path / "out")
    (tmp_path / "delta" / "checksums.json").unlink()
    with pytest.raises(UserError, match=f"{QUERY} contains NaN or infinity"):
        applied(tmp_path / "delta", models / "base", tmp_path / "out")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        Application(str(tmp_path / "delta"), str(models / "base"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta"]


@pytest.mark.parametrize("form", ["adapter", "full", "sparse"])
def test_a_merge_reads_a_model_with_a_delta_over_it(models, tmp_path, form):
    """The same bits as a merge of the model that `lcx apply` writes."""
    extraction, delta = Extraction(str(models / "base"), str(models / "tuned")), tmp_path / "delta"
    write = {
        "adapter": lambda: extraction.adapter(delta, 2, None),
        "full": lambda: extraction.full(delta),
        "sparse": lambda: extraction.sparse(delta, 0.1),
    }
    write[form]()
    applied(delta, models / "base", tmp_path / "written")
    merged = []
    for i, name in enumerate((f"{models / 'base'}+{delta}", str(tmp_path / "written"))):
        found = merge(
            tmp_path, f"out{i}", merge_method="ties", base_model=str(models / "base"), rotary_source=name,
            models=[{"model": model, "parameters": {"weight": 1, "density": 0.5}} for model in (name, str(models / "sibling"))],
        )  # fmt: skip
        merged.append((tensors(found), json.loads((found / "config.json").read_text())["rope_theta"]))
    assert merged[0][1] == merged[1][1] == 4e5
    for name, x in merged[1][0].items():
        np.testing.assert_array_equal(merged[0][0][name], x, err_msg=name)


def test_a_delta_that_does_not_fit_into_a_merge(models, tmp_path):
    extracted(models, tmp_path / "delta", rank=2)
    rewritten(
        models / "base",
        tmp_path / "other",
        lambda _, x: x,
        **{**LONGER, "rope_theta": 7.0, "rope_parameters": {**ROPE, "rope_theta": 7.0}},
    )
    for name, said in (
        (f"{tmp_path / 'other'}+{tmp_path / 'delta'}", "`lcx apply` it first, which asks whose the result gets"),
        (f"{models / 'base'}+{tmp_path / 'none'}", "none does not exist; name the folder that lcx extract wrote"),
        (f"{tmp_path / 'nowhere'}+{tmp_path / 'delta'}", "nowhere does not exist or is not a directory"),
    ):
        with pytest.raises(UserError, match=said):
            merge(tmp_path, merge_method="linear", models=[{"model": name, "parameters": {"weight": 1}}])
    assert not (tmp_path / "out").exists()
