"""`lcx merge`: what is typed and what a file says wrongly is answered with one sentence, and nothing is left behind."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from lcx.cli.main import main
from tests.cli.command import lcx
from tests.merging.folders import HEAD, TOKENIZER, Q, change, load, make

LINEAR = (
    "{merge_method: linear, models: [{model: ROOT/base, parameters: {weight: 1}}, {model: ROOT/tuned, parameters: {weight: 1}}]}"
)
TIES = "{merge_method: ties, base_model: ROOT/base, models: [{model: ROOT/tuned, parameters: {weight: 1}}]}"
SLERP = "{merge_method: slerp, base_model: ROOT/base, models: [{model: ROOT/tuned}], parameters: {t: 0.5}}"
SLICES = (
    "{merge_method: task_arithmetic, base_model: ROOT/base, parameters: {weight: 1}, slices: [{sources: ["
    "{model: ROOT/tuned, layer_range: [0, 2]}, {model: ROOT/other, layer_range: [0, 2]}]}]}"
)

# A file's content, with what is put in the place of what -> what the answer has to name.
WRONG = {
    # the file itself
    ("merge_method: [linear", "", ""): "merge.yml cannot be read as YAML (line 1, column 22: expected ',' or ']', but got "
    "'<stream end>'); fix the file",
    ("- linear", "", ""): "merge.yml is not a mapping of merge_method, models and so on",
    ("{merge_method: linear, merge_method: ties}", "", ""): "(line 1, column 24: the key 'merge_method' is there twice); fix the",
    ("{merge_method: linear,\n at: 2026-99-99}", "", ""): "(line 2, column 6: '2026-99-99' is not a valid timestamp); fix the file",
    ("merge_method: a\x01", "", ""): "(line 1, column 16: the character U+0001 is not allowed); fix the file",
    ("!!python/object/apply:os.system [ls]", "", ""): "cannot be read as YAML (line 1, column 1: could not determine a constructor",
    # keys and values
    (LINEAR, "merge_method", "merge_methd"): "the merge has no field 'merge_methd'; did you mean 'merge_method'?",
    (LINEAR, "linear", "linaer"): "merge_method='linaer' is unknown; did you mean 'linear'?",
    (LINEAR, "merge_method: linear, ", ""): "the merge is missing a value for merge_method",
    (LINEAR, "parameters: {weight: 1}", "paramters: {weight: 1}"): "models[0] has no field 'paramters'; did you mean 'parameters'?",
    (LINEAR, "weight: 1", "wieght: 1"): "models[0].parameters has no field 'wieght'; did you mean 'weight'?",
    (LINEAR, "weight: 1", "weight: heavy"): "models[0].parameters.weight='heavy': expected a number, a list of numbers, or",
    (LINEAR, "weight: 1", "weight: .nan"): "models[0].parameters.weight=nan: expected a number",
    (LINEAR, "weight: 1", "weight: []"): "models[0].parameters.weight is an empty list; give at least one number",
    (LINEAR, "weight: 1", "weight: [{fliter: mlp, value: 1}]"): "weight[0] has no field 'fliter'; did you mean 'filter'?",
    (LINEAR, "weight: 1", "weight: [{filter: mlp}]"): "models[0].parameters.weight[0] has no value; add one",
    (LINEAR, "weight: 1", "weight: [{filter: mlp, value: 1}]"): "the parameter weight of ROOT/base is missing for",
    (LINEAR, "weight: 1", "weight: -1"): "sum to 0; change one of them, or set parameters.normalize to false",
    (LINEAR, "parameters: {weight: 1}", "parameters: {}"): "the parameter weight of ROOT/base is missing for",
    (LINEAR, "{merge", "{parameters: {normalize: maybe}, merge"): "parameters.normalize='maybe': expected true or false",
    (LINEAR, "{merge", "{dtype: bfloat17, merge"): "dtype='bfloat17' is unknown; did you mean 'bfloat16'?",
    (LINEAR, "{merge", "{seed: -1, merge"): "seed=-1 must not be negative",
    (LINEAR, "models:", "slices: [{sources: []}], models:"): "the merge has both models and slices; give one of the two",
    (LINEAR, "models: [", "chat_template: auto, mdels: ["): "the merge has no field 'mdels'; did you mean 'models'?",
    (TIES, "weight: 1", "weight: 1, density: 1.5"): "density=1.5 must be above 0 and at most 1",
    (TIES, "weight: 1", "weight: 1, density: 0"): "density=0 must be above 0 and at most 1",
    (TIES, "weight: 1", "weight: 1, normalize: false"): "normalize=False is one for all models; move it to the parameters of",
    (TIES, "ties", "della"): "density=1 and epsilon=0.15: probabilities from density - epsilon to density + epsilon must lie",
    (TIES, "merge_method: ties", "merge_method: dare_ties, parameters: {rescale_by: l2}"): "rescale_by='l2' is unknown; allowed",
    (SLERP, "t: 0.5", "t: 1.5"): "parameters.t=1.5 must be at least 0 and at most 1",
    (SLERP, "t: 0.5", ""): "the parameter t is missing for model.embed_tokens.weight; give t in its parameters",
    # models
    (LINEAR, "ROOT/base", "ROOT/bsae"): "ROOT/bsae does not exist or is not a directory; fetch a model first",
    (LINEAR, "ROOT/base", "ROOT/model.gguf"): "ROOT/model.gguf is a GGUF file, but lcx merge, extract and apply read Hugging Face "
    "folders; write it as one with `lcx export --checkpoint=ROOT/model.gguf --out=FOLDER`, and name that folder",
    (LINEAR, "ROOT/base", "ROOT/empty"): "ROOT/empty has no config.json, so it is not a Hugging Face model",
    (LINEAR, "ROOT/base", "ROOT/pickled"): "pytorch_model.bin is a pickle, which can run arbitrary code when loaded",
    (LINEAR, "ROOT/base", "ROOT/broken"): "is not a complete safetensors file",
    (TIES, "base_model: ROOT/base, ", ""): "merge_method=ties needs base_model; name the model that the others are relative to",
    (TIES, "ROOT/tuned", "ROOT/base"): "models: merge_method=ties takes at least 1 model beside base_model but got 0 (none)",
    (SLERP, "[", "[{model: ROOT/other}, "): "slerp takes 1 model beside base_model but got 2 (ROOT/other, ROOT/tuned); change",
    (LINEAR, "ROOT/tuned", "ROOT/nan"): f"{Q.format(1)} contains NaN or infinity",
    (LINEAR, "ROOT/tuned", "ROOT/mistral"): "ROOT/base and ROOT/mistral differ in model_type ('llama' and 'mistral'); choose",
    (LINEAR.replace("base", "mistral"), "tuned", "window"): "differ in model.pattern (('global',) and ('local',)); choose models",
    (LINEAR, "ROOT/tuned", "ROOT/wide"): "differ in intermediate_size (24 and 32); choose models of one shape, or correct a config",
    (LINEAR, "ROOT/tuned", "ROOT/bare"): f"ROOT/bare has no {HEAD}, which ROOT/base has; choose models of one architecture",
    (LINEAR, "ROOT/tuned", "ROOT/shape"): f"{HEAD} has the shape [41, 16] in ROOT/shape and [40, 16] in ROOT/base; choose models",
    (LINEAR, "ROOT/tuned", "ROOT/deep"): "differ in num_hidden_layers (4 and 5)",
    (LINEAR, "ROOT/tuned", "ROOT/large"): "differ in vocab_size (40 and 48); give them one vocabulary first",
    (LINEAR, "weight: 1", "weight: 1e39, weigth: 1"): "models[0].parameters has no field 'weigth'; did you mean 'weight'?",
    ("{parameters: {normalize: false}, dtype: float16, " + LINEAR[1:], "weight: 1", "weight: 1e5"): "out of range for float16;",
    # vocabulary, rotary settings, templates
    (LINEAR, "ROOT/tuned", "ROOT/tokens"): "differ ('<end>' is 39 in one, '<end>' is 38 in the other), so their embeddings do not",
    (LINEAR, "{merge", "{tokenizer_source: union, merge"): "lcx merges models of one vocabulary: set tokenizer_source to base, or",
    (LINEAR, "{merge", "{tokenizer_source: ROOT/non, merge"): "ROOT/non' is neither 'base' nor the folder of a model; name one",
    (LINEAR, "{merge", "{tokenizer_source: ROOT/other, merge"): "ROOT/other has no tokenizer; name another model",
    (LINEAR, "{merge", "{tokenizer: {source: base}, tokenizer_source: base, merge"): "say the same thing; keep only one of them",
    (LINEAR, "{merge", "{chat_template: chatml, merge"): "chat_template='chatml' is neither auto, nor a template's text, nor a",
    (LINEAR, "ROOT/tuned", "ROOT/longer"): "say whose counts with rotary_source: ROOT/longer",
    (LINEAR, "{merge", "{rotary_source: ROOT/other, merge"): "rotary_source='ROOT/other' is none of the merged models; name one of",
    # slices
    (SLICES.replace("[0, 2]", "[0, 5]"), "", ""): "slices[0].sources[0].layer_range=[0, 5] does not lie within the 4 layers",
    (SLICES, "tuned, layer_range: [0, 2]", "tuned, layer_range: [2, 2]"): "its sources have [0, 2] layers; give all of them ranges",
    (SLICES, "tuned, layer_range: [0, 2]", "tuned, layer_range: [1, 3]"): "begin at layers [0, 1], so it is open which of the",
    (SLICES, "[0, 2]", "all"): "slices[0].sources[0].layer_range='all': expected a list, got str",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Models that fit together, and models that fit to none."""
    root = tmp_path_factory.mktemp("models")
    base = make(root / "base", tokenizer=TOKENIZER)
    make(root / "tuned", seed=1, near=base, tokenizer=TOKENIZER)
    make(root / "other", seed=2, near=base)
    (root / "empty").mkdir()
    (root / "model.gguf").write_bytes(b"GGUF")
    for name in ("pickled", "broken"):
        shutil.copytree(base, root / name)
    (root / "pickled" / "model.safetensors").rename(root / "pickled" / "pytorch_model.bin")
    (root / "broken" / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-100])
    for name in ("nan", "bare", "shape"):
        make(root / name, seed=2, near=base)
    broken = load(root / "nan")[Q.format(1)]
    broken[3, 4] = np.nan
    change(root / "nan", Q.format(1), broken)
    change(root / "bare", HEAD, None)
    change(root / "shape", HEAD, np.zeros((41, 16), np.float32))
    make(root / "mistral", model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None)
    make(root / "window", model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=24)
    make(root / "wide", intermediate_size=32)
    make(root / "deep", num_hidden_layers=5)
    make(root / "large", vocab_size=48)
    make(root / "longer", rope_theta=5e5, max_position_embeddings=256)
    tokens = {**TOKENIZER, "added_tokens": [{"id": 38, "content": "<end>", "special": True}]}
    make(root / "tokens", seed=2, near=base, tokenizer=tokens)
    return root


def one_sentence(err, says):
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert says in lines[0], err


def refused(words, capsys):
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    assert left.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("given", WRONG, ids=[f"{i}" for i in range(len(WRONG))])
def test_a_wrong_merge_is_refused_in_one_sentence(given, root, tmp_path, capsys):
    text, part, other = given
    assert part in text
    path = tmp_path / "merge.yml"
    path.write_text(text.replace(part, other, 1).replace("ROOT", str(root)))
    err = refused(["merge", f"--config={path}", f"--out={tmp_path / 'out'}"], capsys)
    one_sentence(err, WRONG[given].replace("ROOT", str(root)))
    assert [found.name for found in tmp_path.iterdir()] == ["merge.yml"]


def test_what_is_typed_wrongly(root, tmp_path, capsys):
    path = tmp_path / "merge.yml"
    path.write_text(LINEAR.replace("ROOT", str(root)))
    for words, says in {
        (): "--config is missing; name a YAML file such as merge.yml",
        (f"--config={path}",): "--out is missing; name a new directory",
        (f"--config={tmp_path}/merge.yaml", "--out=x"): "merge.yaml does not exist or is not a file; name a YAML file such as",
        (f"--config={path}", f"--out={root / 'base'}"): "already exists; choose a new folder, or delete it first",
        (f"--config={path}", f"--out={path}/out"): "merge.yml is a file; choose another folder",
        (f"--config={path}", "--out=x", "again"): "unexpected argument 'again'; see lcx merge --help",
        (f"--config={path}", "--out=x", "--dry-rn"): "unknown flag --dry-rn for lcx merge",
        (f"--config={path}", "--out=x", "--max_shard_gb=0"): "invalid value --max_shard_gb=0",
        (f"--config={path}", "--out=x", "--config.seed=1"): "unknown flag --config.seed for lcx merge",
    }.items():
        one_sentence(refused(["merge", *words], capsys), says)
    assert load(root / "base")[HEAD].shape == (40, 16)


def test_a_disk_without_room_is_asked_before_anything_is_written(root, tmp_path, capsys, monkeypatch):
    path = tmp_path / "merge.yml"
    path.write_text(LINEAR.replace("ROOT", str(root)))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    for more in ([], ["--dry_run"]):
        err = refused(["merge", f"--config={path}", f"--out={tmp_path / 'out'}", *more], capsys)
        one_sentence(err, "needs 0.0 GB and the disk has 0.0 GB left; free some space or choose another disk")
    assert [found.name for found in tmp_path.iterdir()] == ["merge.yml"]


def test_a_disk_that_fills_while_a_merge_is_written(root, tmp_path):
    path = tmp_path / "merge.yml"
    path.write_text(LINEAR.replace("ROOT", str(root)))
    ended = lcx(["merge", f"--config={path}", f"--out={tmp_path / 'out'}"], limit=6000)
    one_sentence(ended.stderr, "operating system error 'File too large'")
    assert ended.returncode == 1
    assert [found.name for found in tmp_path.iterdir()] == ["merge.yml"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TIES, "merged 1 model and a base by ties"),
        # It is there for its tokenizer, and a model like the other.
        (LINEAR.replace("linear,", "linear, base_model: ROOT/base,"), "merged 2 models by linear"),
    ],
)
def test_a_base_is_not_counted_as_one_of_the_models(root, tmp_path, capsys, text, said):
    path = tmp_path / "merge.yml"
    path.write_text(text.replace("ROOT", str(root)))
    main(["merge", f"--config={path}", f"--out={tmp_path / 'out'}"])
    assert f"{said} into {tmp_path / 'out'}: " in capsys.readouterr().out


def test_a_merge_says_where_it_is(root, tmp_path, capsys):
    path = tmp_path / "merge.yml"
    path.write_text(LINEAR.replace("ROOT", str(root)))
    out = tmp_path / "models" / "merged"
    main(["merge", f"--config={path}", f"--out={out}"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"merged 2 models by linear into {out}: 9,104 parameters, 36.4 kB")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert yaml.safe_load(path.read_text())["merge_method"] in (out / "README.md").read_text()
    main(["merge", "--help"])
    assert "YAML file with merge_method" in capsys.readouterr().out
    assert Path(root, "base", "model.safetensors").exists()
