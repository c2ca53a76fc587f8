"""Merges of folders: which tensors and parameters go where, what lies beside them, and that it is there whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from lcx.interop.folder import HfFolder
from lcx.interop.shards import INDEX
from lcx.merging import tensors
from lcx.merging.merge import Merge
from tests.merging.folders import EMBED, HEAD, NORM, TOKENIZER, Q, change, describe, load, make, merge


@pytest.fixture
def models(tmp_path):
    """A base and two fine-tunes."""
    base = make(tmp_path / "base")
    return [str(base), *(str(make(tmp_path / f"tuned{i}", seed=i, near=base)) for i in (1, 2))]


def listed(paths, **parameters):
    return [{"model": path, "parameters": dict(parameters)} for path in paths]


def shares(merged, one, other):
    """Which share of `one` each tensor of a linear merge has; the rest is of `other`."""
    one, other = load(Path(one)), load(Path(other))
    found = {}
    for name, tensor in load(merged).items():
        way = (one[name] - other[name]).astype(np.float64)
        found[name] = float(((tensor - other[name]) * way).sum() / (way**2).sum())
        np.testing.assert_allclose(tensor, other[name] + found[name] * way, atol=1e-5)
    return found


def test_a_gradient_goes_over_the_layers_and_begins_outside_of_them(models, tmp_path):
    _, a, b = models
    weight = [{"model": a, "parameters": {"weight": [0, 0.5, 1]}}, {"model": b, "parameters": {"weight": 1}}]
    found = shares(merge(tmp_path, merge_method="linear", models=weight), a, b)
    for layer, value in enumerate((0, 1 / 3, 2 / 3, 1)):
        assert found[Q.format(layer)] == pytest.approx(value / (1 + value), abs=1e-6)
    assert [found[name] for name in (EMBED, NORM, HEAD)] == pytest.approx([0, 0, 0], abs=1e-6)


def test_the_first_filter_that_fits_a_tensor_counts(models, tmp_path):
    base, a, _ = models
    weight = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "layers.1", "value": 0.25}, {"filter": "*", "value": "1e-1"}]
    given = [{"model": base, "parameters": {"weight": 1}}, {"model": a, "parameters": {"weight": weight}}]
    found = shares(merge(tmp_path, merge_method="linear", models=given), a, base)
    assert [found[Q.format(layer)] for layer in range(4)] == pytest.approx([0, 1 / 4, 2 / 5, 1 / 2], abs=1e-5)
    assert found["model.layers.1.mlp.up_proj.weight"] == pytest.approx(0.2, abs=1e-5)
    assert found[EMBED] == pytest.approx(1 / 11, abs=1e-5)
    assert found["model.layers.0.mlp.up_proj.weight"] == pytest.approx(1 / 11, abs=1e-5)


def test_settings_of_a_source_count_more_than_those_of_its_slice_and_of_the_merge(models, tmp_path):
    _, a, b = models

    def source(model, **parameters):
        return {"model": model, "layer_range": [0, 2], "parameters": parameters}

    slices = [
        {"sources": [source(a, weight=3), source(b)], "parameters": {"weight": 1}},
        {"sources": [source(a), source(b)], "parameters": {"weight": [{"filter": "mlp", "value": 0}]}},
    ]
    out = merge(tmp_path, merge_method="linear", slices=slices, parameters={"weight": 2, "normalize": False}, seed=0)
    found, first, second = (load(Path(x)) for x in (out, a, b))
    np.testing.assert_allclose(found[Q.format(1)], 3 * first[Q.format(1)] + second[Q.format(1)], atol=1e-5)
    np.testing.assert_allclose(found[Q.format(3)], 2 * (first[Q.format(1)] + second[Q.format(1)]), atol=1e-5)
    assert not found["model.layers.3.mlp.up_proj.weight"].any()


def test_layers_are_stacked_anew_and_counted(models, tmp_path):
    base, a, _ = models
    layers = [{"model": base, "layer_range": [0, 3]}, {"model": a, "layer_range": [1, 4], "parameters": {"scale": 0.5}}]
    out = merge(tmp_path, merge_method="passthrough", slices=[{"sources": [one]} for one in layers], max_bytes=5000)
    found, first, second = (load(Path(x)) for x in (out, base, a))
    for layer in range(6):
        wanted = first[Q.format(layer)] if layer < 3 else 0.5 * second[Q.format(layer - 2)]
        assert np.array_equal(found[Q.format(layer)], wanted)
    assert np.array_equal(found[EMBED], first[EMBED])
    assert np.array_equal(found[NORM], 0.5 * second[NORM])
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 6
    assert HfFolder(out).described.model.num_layers == 6


def test_a_base_that_a_slice_does_not_list_has_the_layers_of_the_others(models, tmp_path):
    base, a, b = models
    source = [{"model": x, "layer_range": [1, 3], "parameters": {"weight": 0.5}} for x in (a, b)]
    out = merge(tmp_path, merge_method="task_arithmetic", base_model=base, slices=[{"sources": source}])
    found, *inputs = (load(Path(x)) for x in (out, base, a, b))
    wanted = 0.5 * inputs[1][Q.format(1)] + 0.5 * inputs[2][Q.format(1)]
    np.testing.assert_allclose(found[Q.format(0)], wanted, atol=1e-6)


def test_types_and_shards_of_the_result(models, tmp_path):
    _, a, b = models
    given = dict(merge_method="linear", models=listed([a, b], weight=0.5))
    exact = load(merge(tmp_path, "exact", **given))
    out = merge(tmp_path, "small", max_bytes=4000, dtype="float32", out_dtype="bfloat16", **given)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    found = load(out)
    for name, tensor in found.items():
        assert np.array_equal(tensor, exact[name].astype(ml_dtypes.bfloat16))
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {name for name, where in index["weight_map"].items() if where == file.name} == set(opened.keys())
            assert sum(found[name].nbytes for name in opened.keys()) <= 4000 or len(list(opened.keys())) == 1  # noqa: SIM118
    assert HfFolder(out).dtype == "bfloat16"


def test_without_a_dtype_tensors_stay_as_they_are_stored(tmp_path):
    base = make(tmp_path / "base", dtype="bfloat16")
    change(base, NORM, np.ones(16, np.float32))
    out = merge(tmp_path, merge_method="passthrough", models=[{"model": str(base)}])
    assert {name: tensor.dtype for name, tensor in load(out).items()} == {name: x.dtype for name, x in load(base).items()}
    assert all(np.array_equal(tensor, load(base)[name]) for name, tensor in load(out).items())


def test_bfloat16_is_rounded_once(tmp_path):
    base = make(tmp_path / "base", dtype="bfloat16")
    a, b = (make(tmp_path / name, seed=i, near=base, dtype="bfloat16") for i, name in enumerate("ab", 1))
    out = merge(tmp_path, merge_method="task_arithmetic", base_model=str(base), models=listed(map(str, (a, b)), weight=0.37))
    found, *inputs = (load(x) for x in (out, base, a, b))
    for name, tensor in found.items():
        x, y, z = (one[name].astype(np.float64) for one in inputs)
        wanted = (x + 0.37 * (y - x) + 0.37 * (z - x)).astype(np.float32).astype(ml_dtypes.bfloat16)
        assert np.mean(tensor != wanted) < 0.01  # sums in float32 and float64 that lie next to the middle of two numbers


def test_the_bits_do_not_depend_on_blocks_in_flight_or_the_place_of_the_folders(models, tmp_path, monkeypatch):
    def run(name, paths):
        given = dict(merge_method="dare_ties", base_model=paths[0], models=listed(paths[1:], weight=0.5, density=0.5), seed=3)
        return {path.name: path.read_bytes() for path in merge(tmp_path, name, **given).glob("*.safetensors")}

    monkeypatch.setattr(tensors, "BLOCK", 100)
    first = run("first", models)
    monkeypatch.setattr(tensors, "THREADS", 1)
    moved = tmp_path / "moved"
    moved.mkdir()
    paths = [str(Path(path).rename(moved / Path(path).name)) for path in models]
    assert run("second", paths) == first


def test_rotary_settings_of_the_model_that_is_named(tmp_path):
    base = make(tmp_path / "base")
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    longer = make(tmp_path / "longer", seed=1, near=base, rope_theta=5e5, rope_scaling=scaling, max_position_embeddings=256)
    given = dict(merge_method="linear", base_model=str(base), models=listed(map(str, (base, longer)), weight=0.5))
    (base / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    out = merge(tmp_path, rotary_source=str(longer), **given)
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"model_max_length": 256}
    values = json.loads((out / "config.json").read_text())
    assert (values["rope_theta"], values["rope_scaling"], values["max_position_embeddings"]) == (5e5, scaling, 256)
    assert HfFolder(out).described.schemes == HfFolder(longer).described.schemes
    kept = json.loads((merge(tmp_path, "kept", rotary_source=str(base), **given) / "config.json").read_text())
    assert (kept["rope_theta"], kept["max_position_embeddings"]) == (10000.0, 64) and "rope_scaling" not in kept


def test_rotary_settings_in_the_form_of_transformers_5_and_the_older_one_are_the_same(tmp_path):
    base = make(tmp_path / "base")
    newer = make(
        tmp_path / "newer", seed=1, near=base, rope_theta=None, rope_parameters={"rope_theta": 1e4, "rope_type": "default"}
    )
    assert merge(tmp_path, merge_method="linear", models=listed(map(str, (base, newer)), weight=0.5)).is_dir()


def test_files_beside_the_weights(tmp_path):
    base = make(tmp_path / "base", tokenizer=TOKENIZER)
    own = {**TOKENIZER, "version": "2.0"}  # the same vocabulary in another file
    tuned = make(tmp_path / "tuned", seed=1, near=base, tokenizer=own)
    (tuned / "chat_template.jinja").write_text("{{ messages }}")
    (tuned / "generation_config.json").write_text('{"eos_token_id": 5}')
    given = dict(merge_method="linear", base_model=str(base), models=listed(map(str, (base, tuned)), weight=0.5))
    plain = merge(tmp_path, "plain", **given)
    assert (plain / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not (plain / "chat_template.jinja").exists()
    card = (plain / "README.md").read_text()
    assert card.startswith("---\n") and "merge_method: linear" in card and "- base\n- tuned\n" in card
    for name, source in (("named", {"tokenizer_source": str(tuned)}), ("newer", {"tokenizer": {"source": str(tuned)}})):
        out = merge(tmp_path, name, **given, **source)
        assert json.loads((out / "tokenizer.json").read_text())["version"] == "2.0"
        assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
        assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 39}


def test_chat_templates(tmp_path):
    base = make(tmp_path / "base", tokenizer=TOKENIZER)
    tuned = [make(tmp_path / f"tuned{i}", seed=i, near=base, tokenizer=TOKENIZER) for i in (1, 2)]
    (base / "tokenizer_config.json").write_text('{"chat_template": "{{ old }}", "eos_token": "<end>"}')
    for folder in tuned:
        (folder / "chat_template.jinja").write_text("{{ new }}")
    (tmp_path / "own.jinja").write_text("{{ own }}")
    given = dict(merge_method="linear", base_model=str(base), models=listed(map(str, (base, *tuned)), weight=1))
    for i, (asked, wanted) in enumerate(
        {"auto": "{{ new }}", "{{ x }}": "{{ x }}", str(tmp_path / "own.jinja"): "{{ own }}"}.items()
    ):
        out = merge(tmp_path, f"out{i}", chat_template=asked, **given)
        assert (out / "chat_template.jinja").read_text() == wanted
        assert json.loads((out / "tokenizer_config.json").read_text()) == {"eos_token": "<end>"}


def test_a_head_that_is_tied_and_old_buffers_do_not_stand_in_the_way(tmp_path):
    base = make(tmp_path / "base", tie_word_embeddings=True)
    tuned = make(tmp_path / "tuned", seed=1, near=base, tie_word_embeddings=True)
    change(tuned, HEAD, load(tuned)[EMBED])
    change(tuned, "model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(4, np.float32))
    out = merge(tmp_path, merge_method="linear", models=listed(map(str, (base, tuned)), weight=0.5))
    assert load(out).keys() == load(base).keys()


def test_a_dry_run_shows_everything_and_writes_nothing(models, tmp_path, capsys):
    base, a, b = models
    given = dict(merge_method="ties", base_model=base, models=listed([a, b], weight=[0.25, 0.75], density=0.5))
    merge = Merge(describe(tmp_path / "merge.yml", parameters={"int8_mask": True, "gamma": 0.1}, **given))
    merge.show(tmp_path / "out")
    out, err = capsys.readouterr()
    row = next(line for line in out.splitlines() if "layers.*.self_attn.q_proj.weight" in line)
    assert "weight=0.25, 0.25" in row and "weight=0.75, 0.75" in row and "density=0.5, 0.5" in row and "│      4 │" in row
    assert "rope_theta=10000.0, max_position_embeddings=64 │ counts" in out
    numbers = sum(tensor.size for tensor in load(Path(base)).values())
    assert f"would write {numbers:,} parameters as float32" in out
    assert "parameters.int8_mask changes nothing here" in err and "parameters.gamma is not a parameter of ties" in err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


KILLED = """
import os, signal, sys
from pathlib import Path
from lcx.merging import writer
from lcx.merging.merge import Merge

finish, done = writer.Writer.finish, []

def finish_some(self, name):
    finish(self, name)
    done.append(name)
    if len(done) == 20:
        os.kill(os.getpid(), signal.SIGKILL)

writer.Writer.finish = finish_some
Merge(sys.argv[1]).write(Path(sys.argv[2]), 4000)
"""


def test_a_killed_merge_leaves_nothing_half_written_and_a_second_one_works(models, tmp_path):
    path = describe(tmp_path / "merge.yml", merge_method="linear", models=listed(models[1:], weight=0.5))
    out, part = tmp_path / "out", tmp_path / ".out.part"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", KILLED, path, out], env=env)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists() and len(list(part.glob("*.safetensors"))) > 3 and not (part / INDEX).exists()
    Merge(path).write(out, 4000)
    assert not part.exists() and load(out).keys() == load(Path(models[0])).keys()


def test_what_a_merge_holds_does_not_grow_with_its_tensors(models, tmp_path, monkeypatch):
    """No block is larger than asked for, and no more are read than are worked on."""
    monkeypatch.setattr(tensors, "BLOCK", 64)
    seen = []
    rows = tensors.Reader.rows

    def watched(self, name):
        read = rows(self, name)

        def watch(start, stop):
            found = read(start, stop)
            seen.append(found.size)
            return found

        return watch

    monkeypatch.setattr(tensors.Reader, "rows", watched)
    base, a, b = models
    merge(tmp_path, merge_method="ties", base_model=base, models=listed([a, b], weight=0.5, density=0.3))
    assert max(seen) == 64


@pytest.mark.slow
def test_transformers_loads_what_was_merged(models, tmp_path):
    import torch
    import transformers

    base, a, b = models
    out = merge(tmp_path, merge_method="linear", models=listed([a, b], weight=0.5), max_bytes=20_000)
    found = transformers.AutoModelForCausalLM.from_pretrained(out)
    for name, tensor in load(out).items():
        assert torch.equal(found.state_dict()[name], torch.from_numpy(tensor))
