"""Weights of a merge by layer, found by the loss of a text."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from lcx.cli.main import main
from lcx.core.batch import Batch
from lcx.core.errors import UserError
from lcx.merging.merge import Merge
from lcx.model.architecture import build_architecture, build_schemes
from lcx.model.loss import logits, token_losses
from lcx.model.transformer import hidden_states
from lcx.recipes import models
from lcx.recipes.merge_search import SearchConfig, combined, descend, search
from tests.merging.folders import TOKENIZER, describe, make

LENGTH = 32

END = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, **TOKENIZER["added_tokens"][0]}
LETTERS = {**TOKENIZER, "added_tokens": [END]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and two fine-tunes."""
    root = tmp_path_factory.mktemp("models")
    base = make(root / "base", tokenizer=LETTERS)
    return [str(base), *(str(make(root / name, i, base, 0.1, tokenizer=LETTERS)) for i, name in ((1, "one"), (2, "two")))]


@pytest.fixture(scope="module")
def parts(folders):
    """Parameters of the base, what the others add, architecture and buffers."""
    loaded = [models.load(folder) for folder in folders]
    run = loaded[0].run
    arch, buffers = build_architecture(run.model, run.execution, build_schemes(run.model, loaded[0].schemes), LENGTH)
    base = loaded[0].params
    return base, [jax.tree.map(jnp.subtract, one.params, base) for one in loaded[1:]], arch, buffers


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(np.random.default_rng(0).choice(list("abcdefgh"), 2000)))
    return str(path)


def mean_loss(params, rows, arch, buffers):
    batch = Batch.from_tokens(jnp.asarray(rows))
    return float(jnp.mean(token_losses(params, hidden_states(params, buffers, arch, batch)[0], batch.targets, arch).nll))


def written(params, arch, buffers, count):
    """`[count, LENGTH + 1]` tokens drawn from a model."""

    @jax.jit
    def following(rows, at, key):
        found = logits(params, hidden_states(params, buffers, arch, Batch.from_tokens(rows))[0], arch.config)
        return rows.at[:, at + 1].set(jax.random.categorical(jax.random.fold_in(key, at), found[:, at]))

    rows = jnp.tile(jnp.arange(count)[:, None] % arch.config.vocab_size, (1, LENGTH + 1))
    for at in range(LENGTH):
        rows = following(rows, at, jax.random.key(0))
    return np.asarray(rows, np.int32)


def test_the_weights_of_a_model_that_wrote_the_text_are_found(parts):
    base, added, arch, buffers = parts
    truth = jnp.asarray([[0.8, 0.2, 0.5, 0.9, 0.7], [0.0, 0.6, 0.0, 0.3, 0.1]])
    rows = written(combined(base, added, truth), arch, buffers, 64)
    start = np.full((2, 5), 0.5)
    found = descend(base, added, start, rows, arch, buffers, SearchConfig(("unused",), seq_len=LENGTH, steps=200))
    of_truth = mean_loss(combined(base, added, truth), rows[1::2], arch, buffers)
    assert found.loss_before == pytest.approx(mean_loss(combined(base, added, jnp.asarray(start)), rows[1::2], arch, buffers), 1e-5)
    assert found.loss_after < of_truth + 0.3 * (found.loss_before - of_truth)
    assert np.abs(found.after - truth).mean() < 0.3 * np.abs(start - truth).mean()


@pytest.mark.parametrize(
    "described",
    [
        lambda base, one, two: {
            "merge_method": "task_arithmetic", "base_model": base, "parameters": {"lambda": 0.5, "weight": 0.6},
            "models": [{"model": one, "parameters": {"weight": [0.1, 0.9]}}, {"model": two}],
        },
        pytest.param(
            lambda base, one, two: {
                "merge_method": "linear",
                "models": [{"model": name, "parameters": {"weight": weight}} for name, weight in ((base, 2), (one, 1), (two, 1))],
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["task_arithmetic", "linear"],
)  # fmt: skip
def test_the_merge_that_is_written_has_the_loss_that_was_found(described, folders, parts, text, tmp_path):
    path = describe(tmp_path / "merge.yml", **described(*folders))
    given = tmp_path / "given"
    Merge(path).write(given)
    command = ["merge", f"--config={path}", f"--out={tmp_path / 'out'}", f"--tune={text}", f"--tune_length={LENGTH}"]
    main([*command, "--tune_steps=12", "--tune_tokens=512"])
    _, found = search(Merge(path), SearchConfig((text,), seq_len=LENGTH, steps=12, tokens=512))
    assert found.loss_after < found.loss_before
    _, _, arch, buffers = parts
    ids = {letter: i for letter, i in TOKENIZER["model"]["vocab"].items()}
    tokens = np.array([ids[letter] for letter in Path(text).read_text()[: 16 * (LENGTH + 1)]], np.int32)
    asked = tokens.reshape(16, LENGTH + 1)[1::2]
    for folder, loss in ((given, found.loss_before), (tmp_path / "out", found.loss_after)):
        assert mean_loss(models.load(folder).params, asked, arch, buffers) == pytest.approx(loss, abs=2e-5)
    tuned = yaml.safe_load((tmp_path / "merge.tuned.yml").read_text())
    assert (
        tuned["merge_method"] == described(*folders)["merge_method"]
        and len(tuned["models"][-1]["parameters"]["weight"][0]["value"]) == 4
    )


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({"merge_method": "ties"}, [], "--tune searches weights of merges that are linear in them, which merge_method=ties is not"),
        (
            {"merge_method": "linear", "parameters": {"normalize": False}},
            [],
            "keeps the sum of weights at 1, but parameters.normalize",
        ),
        ({"models": []}, [], "models is empty; list at least one"),
        ({}, ["--tune_length=128"], "--tune_length=128 exceeds the 64 tokens that"),
        ({}, ["--tune_length=64", "--tune={tmp}/short.txt"], "two rows of 65 are needed; name more text, or lower --tune_length"),
        ({}, ["--tune={tmp}/none.txt"], "none.txt"),
        ({}, ["--dry_run"], "--dry_run and --tune conflict"),
        ({}, ["--out={tmp}/full"], "full already exists; choose a new folder"),
    ],
)
def test_wrong_inputs(changes, words, said, folders, text, tmp_path, capsys):
    base, one, two = folders
    values = {
        "merge_method": "task_arithmetic", "base_model": base,
        "models": [{"model": name, "parameters": {"weight": 0.5}} for name in (one, two)],
    }  # fmt: skip
    path = describe(tmp_path / "merge.yml", **{**values, **changes})
    (tmp_path / "short.txt").write_text("abc" * 20)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "there").touch()
    words = [word.format(tmp=tmp_path) for word in words]
    tune = [] if any(word.startswith("--tune=") for word in words) else [f"--tune={text}"]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit):
        main(["merge", f"--config={path}", f"--out={tmp_path / 'out'}", *tune, *words])
    error = capsys.readouterr().err
    assert said in error and error.count("\n") <= 2 and error.startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_sizes_of_a_search_that_is_not_made(folders, tmp_path, capsys):
    path = describe(tmp_path / "merge.yml", merge_method="linear", models=[{"model": folders[0], "parameters": {"weight": 1}}])
    with pytest.raises(SystemExit):
        main(["merge", f"--config={path}", f"--out={tmp_path / 'out'}", "--tune_steps=3"])
    assert "belong to --tune, which is not given" in capsys.readouterr().err
    with pytest.raises(UserError, match="--tune needs a model besides"):
        search(Merge(path), SearchConfig(("x",)))
