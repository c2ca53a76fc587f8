import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from lcx.core.console import Progress
from lcx.core.errors import UserError
from lcx.core.mesh import MeshConfig, make_mesh, mesh_of
from lcx.core.param_spec import initialize, shardings
from lcx.data.config import DataConfig, PartConfig, SourceConfig
from lcx.evals import needles, results, suite
from lcx.evals.scoring import model_scorer, score
from lcx.evals.suite import EvalConfig, _generated, evaluate, gather
from lcx.model.architecture import build_architecture, build_schemes
from lcx.model.config import ModelConfig
from lcx.model.decode import generate
from lcx.model.execution import ExecutionConfig
from lcx.model.params import specs

MODEL = ModelConfig(model_dim=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=32)
SCHEMES = build_schemes(MODEL, {"default": "rope:theta=100"})
CONFIG = EvalConfig(
    lengths=(64, 128), depths=(0.0, 1.0), needle_items=3, zero_shot=("linear", "ntk", "rope:theta=critical"), zero_shot_items=2,
    perplexity_tokens=512, tokens_per_forward=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return initialize(specs(MODEL, SCHEMES, 128), jax.random.key(0))


@pytest.fixture
def data(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"file {i}\n" + "".join(f"line {i * 1000 + n} of text\n" for n in range(60)))
    source = SourceConfig(kind="text", path=str(tmp_path / "*.txt"))
    parts = {"text": PartConfig(source=source), "needles": PartConfig(kind="multikey", source=source)}
    return DataConfig(parts=parts, heldout_fraction=0.5)


def test_evaluates_every_scheme_and_writes_json(params, data, tmp_path):
    said = []
    result = evaluate(
        params,
        MODEL,
        ExecutionConfig(),
        SCHEMES,
        data,
        CONFIG,
        trained=64,
        label="before",
        step=7,
        workdir=tmp_path,
        announce=said.append,
    )
    names = ["none", "linear", "ntk", "rope:theta=critical"]
    assert [grid.scheme for grid in result.needles] == names == [curve.scheme for curve in result.perplexity]
    assert [grid.items for grid in result.needles] == [3, 2, 2, 2]
    assert {point.tokens for curve in result.perplexity for point in curve.points} == {512}
    base, *others = (curve.at(64).nll for curve in result.perplexity)
    assert others == pytest.approx([base] * 3, rel=1e-6)  # at the trained length every factor is 1
    assert len({round(curve.at(128).nll, 6) for curve in result.perplexity}) == 4
    assert results.read(tmp_path / "eval" / "before.json") == dataclasses.replace(
        result, settings=json.loads(json.dumps(result.settings))
    )
    assert len(said) == 8


@pytest.mark.parametrize(
    "left_out", [{}, {"generation_items": 1}, {"needle_items": 0}, {"zero_shot_items": 0}, {"perplexity_tokens": 0}]
)
def test_the_bar_ends_at_its_total(params, data, monkeypatch, left_out):
    bars = []

    class Watched(Progress):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            bars.append(self)

    monkeypatch.setattr(suite, "Progress", Watched)
    config = dataclasses.replace(CONFIG, **left_out)
    evaluate(params, MODEL, ExecutionConfig(), SCHEMES, data, config, trained=64, announce=lambda _: None)
    assert [bar._done for bar in bars] == [bar._total for bar in bars] != [0]


def test_another_theta_or_scheme_of_the_same_form_compiles_nothing(params, data):
    config = dataclasses.replace(CONFIG, zero_shot=())
    evaluate(params, MODEL, ExecutionConfig(), SCHEMES, data, config, trained=64, announce=lambda _: None)
    before = score._cache_size()
    evaluate(
        params,
        MODEL,
        ExecutionConfig(),
        build_schemes(MODEL, {"default": "rope:theta=7"}),
        data,
        CONFIG,
        trained=64,
        announce=lambda _: None,
    )
    assert score._cache_size() == before


def test_text_and_needles_are_held_out(data):
    materials = gather(data, CONFIG)
    train = {i for i in range(6)} - set(_files(materials.text))
    assert train and not set(_files(materials.items[128].tokens)) & train


def _files(rows: np.ndarray) -> list[int]:
    """Numbers of the files whose lines appear, told by the thousands of their line numbers."""
    import re

    return [int(n) // 1000 for row in rows for n in re.findall(rb"line (\d+) of", bytes(row.astype(np.uint8)))]


def test_generation_and_teacher_forcing_agree(params, data):
    """Answers made by greedy generation are found by both ways of scoring, others by neither."""
    made = gather(data, CONFIG).items[64]
    arch, buffers = build_architecture(MODEL, ExecutionConfig(), SCHEMES, 64)
    write = functools.partial(generate, params, buffers, arch)
    answers = write([row[:60] for row in made.tokens], 4)
    own = dataclasses.replace(made, tokens=made.tokens.copy())
    own.tokens[:, 60:64] = answers
    own.tokens[0, 62] ^= 1
    wanted = [False] + [True] * (len(own.tokens) - 1)

    def scorer_for(length):
        return model_scorer(params, *build_architecture(MODEL, ExecutionConfig(), SCHEMES, length))

    assert needles.teacher_forced(scorer_for, own, 256).tolist() == wanted
    assert needles.generated(write, own, 256).tolist() == wanted


def test_generation_has_a_grid_of_its_own(params, data):
    config = EvalConfig(
        lengths=(64,), depths=(0.5,), needle_items=2, generation_items=1, perplexity_tokens=0, tokens_per_forward=256
    )
    result = evaluate(params, MODEL, ExecutionConfig(), SCHEMES, data, config, trained=64, announce=lambda _: None)
    assert [(grid.method, grid.items) for grid in result.needles] == [("teacher_forced", 2), ("generation", 1)]
    assert result.perplexity == () and result.grid(method="generation").items == 1


def test_generation_runs_where_the_weights_are(params, data):
    """On a context mesh the same answers, of rows that the context does not divide; nobody has to set the mesh."""
    made = dataclasses.replace(gather(data, CONFIG).items[64], length=67)
    mesh = make_mesh(MeshConfig(fsdp=1, context=4, ulysses=2), jax.devices()[:4])
    config = dataclasses.replace(CONFIG, tokens_per_forward=256)
    arch, buffers = build_architecture(MODEL, ExecutionConfig(), SCHEMES, 67)
    answers = generate(params, buffers, arch, [row[:60] for row in made.tokens], 4)
    made.tokens[:, 60:64] = answers
    made.tokens[0, 62] ^= 1
    split = jax.device_put(params, shardings(specs(MODEL, SCHEMES, 128), mesh))
    with mesh_of(split):
        assert jax.sharding.get_mesh() == mesh
    assert _generated(split, arch, buffers, made, config).tolist() == [False] + [True] * (len(made.tokens) - 1)


@pytest.mark.parametrize("length", [64, 67])
def test_scores_are_the_same_where_rows_are_split(params, length):
    rows = np.random.default_rng(0).integers(0, 256, (2, length + 1))
    split = jax.device_put(params, shardings(specs(MODEL, SCHEMES, 128), make_mesh(MeshConfig(fsdp=1, context=8, ulysses=2))))
    built = build_architecture(MODEL, ExecutionConfig(), SCHEMES, length)
    one, several = (model_scorer(tree, *built)(rows, 5) for tree in (params, split))
    np.testing.assert_allclose(several.nll, one.nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(several.correct, one.correct)
    assert one.nll.shape == several.nll.shape == (2, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (64, 64)}, "must be different lengths"),
        ({"depths": (0.0, 25.0)}, "depths are fractions from 0"),
        ({"zero_shot": ("yarm",)}, "did you mean 'yarn'"),
        ({"needle_items": -1}, "evals.needle_items=-1 must not be negative"),
        ({"effective_threshold": 85.6}, "must be between 0 and 1"),
    ],
)
def test_wrong_settings_are_answered(changes, message):
    with pytest.raises(UserError, match=message):
        EvalConfig(**changes)


def test_wrong_parts_are_answered(data):
    with pytest.raises(UserError, match="did you mean 'needles'"):
        gather(data, dataclasses.replace(CONFIG, task="needle"))
    with pytest.raises(UserError, match="is a text part; the parts with a retrieval task are: needles"):
        gather(data, dataclasses.replace(CONFIG, task="text"))
    with pytest.raises(UserError, match="tokens but evals.lengths needs 100,000"):
        gather(data, dataclasses.replace(CONFIG, lengths=(100_000,)))
