import dataclasses
import json

import jax
import numpy as np
import pytest

from lcx.core.console import Progress
from lcx.core.errors import UserError
from lcx.core.mesh import MeshConfig, make_mesh, mesh_of
from lcx.core.numbers import duration
from lcx.core.param_spec import initialize, shardings
from lcx.data.config import DataConfig, PartConfig, SourceConfig
from lcx.evals import forecast, results, runner
from lcx.evals.answers import AnswerLog
from lcx.evals.backends.local import LocalBackend, score
from lcx.evals.base import Item
from lcx.evals.config import EvalConfig, QuestionConfig
from lcx.evals.forecast import Cell
from lcx.evals.results import Measurement
from lcx.evals.runner import evaluate, fitting_tasks, gather
from lcx.evals.tasks.needles import GeneratedNeedles, Needles
from lcx.evals.tasks.perplexity import Perplexity
from lcx.evals.text.questions import average
from lcx.model.architecture import build_schemes
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.model.params import specs
from tests.quick import mostly_slow

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
    needles, losses = result.select(task="needles"), result.select(task="perplexity", metric="nll")
    assert needles.values("scheme") == names == losses.values("scheme")
    assert [needles.select(scheme=name).values("n") for name in names] == [[3], [2], [2], [2]]
    assert losses.values("n") == [512]
    base, *others = (losses.value(scheme=name, length=64) for name in names)
    assert others == pytest.approx([base] * 3, rel=1e-6)  # at the trained length every factor is 1
    assert len({round(losses.value(scheme=name, length=128), 6) for name in names}) == 4
    assert results.read(tmp_path / "eval" / "before.json") == dataclasses.replace(
        result, settings=json.loads(json.dumps(result.settings))
    )
    assert len(said) == 12


@pytest.mark.parametrize(
    "left_out",
    mostly_slow([{}, {"generation_items": 1}, {"needle_items": 0}, {"zero_shot_items": 0}, {"perplexity_tokens": 0}], [{}]),
)
def test_the_bar_ends_at_its_total(params, data, monkeypatch, left_out):
    bars = []

    class Watched(Progress):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            bars.append(self)

    monkeypatch.setattr(runner, "Progress", Watched)
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
    train = {i for i in range(6)} - set(_files(Perplexity.build(materials).spans.text))
    items = Needles.build(materials).items(128, 3)
    assert train and not set(_files([item.prompt for item in items])) & train


def _files(rows: np.ndarray) -> list[int]:
    """Numbers of the files whose lines appear, told by the thousands of their line numbers."""
    import re

    return [int(n) // 1000 for row in rows for n in re.findall(rb"line (\d+) of", bytes(row.astype(np.uint8)))]


def test_generation_and_teacher_forcing_agree(params, data):
    """Answers made by greedy generation are found by both ways of scoring, others by neither."""
    task, backend = Needles.build(gather(data, CONFIG)), LocalBackend(params, MODEL, ExecutionConfig(), SCHEMES, 64, 256)
    made = answered(backend, task.items(64, 3))
    wanted = [False] + [True] * (len(made) - 1)
    for kind in (Needles, GeneratedNeedles):
        asked = kind(task.task, task.haystack, task.depths, task.seed, task.counts)
        assert [asked.score(*pair) for pair in zip(made, asked.ask(backend, made), strict=True)] == wanted


def answered(backend: LocalBackend, items: list[Item]) -> list[Item]:
    """The items with what the model writes as the answer, but for the first one's third token."""
    made = [dataclasses.replace(item, answer=np.array(new)) for item, new in zip(items, backend.generate(items, 4), strict=True)]
    made[0].answer[2] ^= 1
    return made


def test_generation_has_rows_of_its_own(params, data):
    config = EvalConfig(
        lengths=(64,), depths=(0.5,), needle_items=2, generation_items=1, perplexity_tokens=0, tokens_per_forward=256
    )
    result = evaluate(params, MODEL, ExecutionConfig(), SCHEMES, data, config, trained=64, announce=lambda _: None)
    assert [(row.task, row.n, row.scheme) for row in result.rows] == [("needles", 2, "none"), ("generated_needles", 1, "none")]


def test_questions_in_words_are_asked_and_kept(params, data, tmp_path):
    config = dataclasses.replace(
        CONFIG, tasks=("ruler_niah_single_1", "ruler_fwe"), lengths=(1024, 2048), zero_shot=("linear",), questions=QuestionConfig(3)
    )
    said = []
    asked = (params, MODEL, ExecutionConfig(), SCHEMES, data, config)
    result = evaluate(*asked, trained=1024, workdir=tmp_path, announce=said.append)
    assert {row.metric for row in result.rows} == {"score", "empty", "fill", "average"}
    average = result.select(task="ruler", metric="average")
    assert [(row.scheme, row.length, row.n) for row in average.rows] == [
        (scheme, length, 2) for scheme in ("none", "linear") for length in (1024, 2048)
    ]
    assert any(text.startswith("eval: ruler, none: 1,024: ") for text in said)
    kept = (tmp_path / "eval" / "answers.jsonl").read_text()
    # At the trained length interpolation has the checkpoint's own frequencies, and nothing is asked twice.
    assert len(kept.splitlines()) == 2 * 3 * (2 + 1)
    assert evaluate(*asked, trained=1024, workdir=tmp_path, announce=said.append).rows == result.rows
    assert (tmp_path / "eval" / "answers.jsonl").read_text() == kept


def test_tasks_are_those_that_are_named(params, data):
    config = dataclasses.replace(CONFIG, tasks=("perplexity",), zero_shot=())
    result = evaluate(params, MODEL, ExecutionConfig(), SCHEMES, data, config, trained=64, announce=lambda _: None)
    assert result.values("task") == ["perplexity"]
    with pytest.raises(UserError, match="evals.tasks='needle' is unknown; did you mean 'needles'"):
        evaluate(params, MODEL, ExecutionConfig(), SCHEMES, data, dataclasses.replace(CONFIG, tasks=("needle",)), trained=64)


def test_tasks_are_left_out_where_they_do_not_fit(params, data, capsys):
    config = dataclasses.replace(
        CONFIG, tasks=("ruler_vt", "ruler_niah_single_1"), lengths=(1024, 2048), zero_shot=(), questions=QuestionConfig(1)
    )
    asked = (params, MODEL, ExecutionConfig(), SCHEMES, data)
    result = evaluate(*asked, config, trained=64, announce=lambda _: None)
    assert "ruler_vt is left out at 1,024, which its shortest question does not fit into" in capsys.readouterr().err
    assert {(row.task, row.length) for row in result.select(metric="score").rows} == {
        ("ruler_vt", 2048), ("ruler_niah_single_1", 1024), ("ruler_niah_single_1", 2048),
    }  # fmt: skip
    # An average is that of all tasks.
    assert [(row.length, row.n) for row in result.select(metric="average").rows] == [(2048, 2)]
    with pytest.raises(UserError, match="evals.lengths has 1,024, but ruler_vt takes at least"):
        evaluate(*asked, dataclasses.replace(config, lengths=(512, 1024)), trained=64)
    with pytest.raises(UserError, match="evals.lengths has 32, but graphwalks_bfs_3 takes at least"):
        evaluate(*asked, dataclasses.replace(config, tasks=("graphwalks",), lengths=(32,)), trained=64)


def test_only_a_task_that_is_named_itself_must_fit(data, capsys):
    config = dataclasses.replace(CONFIG, tasks=("ruler",), lengths=(1024,), zero_shot=(), questions=QuestionConfig(1))
    found = [task.name for task, lengths in fitting_tasks(gather(data, config)) if lengths == [1024]]
    assert "ruler_niah_single_1" in found and not {"ruler_vt", "ruler_cwe"} & set(found)
    said = capsys.readouterr().err
    assert "ruler_vt, ruler_cwe" in said and said.count("which their shortest questions do not fit into") == 1


def test_needles_are_checked_before_anything_is_measured(data):
    config = dataclasses.replace(CONFIG, tasks=("needles",), lengths=(16, 64), zero_shot=())
    with pytest.raises(UserError, match="evals.lengths has 8, which does not suit needles: a row of 8 tokens"):
        fitting_tasks(gather(data, dataclasses.replace(config, lengths=(8,))))
    with pytest.raises(UserError, match="evals.lengths has 100,000,000, which does not suit needles: the haystack has"):
        fitting_tasks(gather(data, dataclasses.replace(config, lengths=(64, 100_000_000))))


def test_averages_weigh_tasks_alike():
    rows = [Measurement("a", "score", 9, value, 5, depth) for depth, value in ((0.0, 1.0), (0.5, 0.0), (1.0, 0.5))]
    (found,) = average([*rows, Measurement("b", "score", 9, 1.0, 5)], "both", ("a", "b"))
    assert (found.value, found.n) == (0.75, 2)


def test_generation_runs_where_the_weights_are(params, data):
    """On a context mesh the same answers, of rows that the context does not divide; nobody has to set the mesh."""
    items = Needles.build(gather(data, CONFIG)).items(64, 3)
    mesh = make_mesh(MeshConfig(fsdp=1, context=4, ulysses=2), jax.devices()[:4])
    wanted = LocalBackend(params, MODEL, ExecutionConfig(), SCHEMES, 67, 256).generate(items, 4)
    split = jax.device_put(params, shardings(specs(MODEL, SCHEMES, 128), mesh))
    with mesh_of(split):
        assert jax.sharding.get_mesh() == mesh
    np.testing.assert_array_equal(LocalBackend(split, MODEL, ExecutionConfig(), SCHEMES, 67, 256).generate(items, 4), wanted)


@pytest.mark.parametrize("length", [pytest.param(64, marks=pytest.mark.slow), 67])
def test_scores_are_the_same_where_rows_are_split(params, length):
    rows = np.random.default_rng(0).integers(0, 256, (2, length + 1))
    split = jax.device_put(params, shardings(specs(MODEL, SCHEMES, 128), make_mesh(MeshConfig(fsdp=1, context=8, ulysses=2))))
    items = [Item(row[:-5], row[-5:]) for row in rows]
    made = (LocalBackend(tree, MODEL, ExecutionConfig(), SCHEMES, length).loglikelihood(items) for tree in (params, split))
    for one, several in zip(*made, strict=True):
        np.testing.assert_allclose(several.nll, one.nll, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(several.correct, one.correct)
        assert one.nll.shape == several.nll.shape == (5,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (64, 64)}, "evals.lengths=64,64 names a length twice; leave one out"),
        ({"lengths": (1, 64)}, "evals.lengths=1,64 has a length of fewer than 2 tokens"),
        ({"lengths": ()}, "evals.lengths is empty; give lengths in tokens"),
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
        Needles.build(gather(data, dataclasses.replace(CONFIG, task="needle")))
    with pytest.raises(UserError, match="has no retrieval task; the parts with one are: needles"):
        Needles.build(gather(data, dataclasses.replace(CONFIG, task="text")))
    with pytest.raises(UserError, match="tokens but evals.lengths needs 100,000"):
        Perplexity.build(gather(data, dataclasses.replace(CONFIG, lengths=(100_000,))))


def test_the_time_that_is_left_is_told_by_the_nearest_cells():
    first, second, third = Cell("a", "none", 100, 1.0), Cell("a", "none", 200, 3.0), Cell("a", "none", 400, 10.0)
    other, scheme = Cell("b", "none", 100, 2.0), Cell("a", "ntk", 200, 3.0)
    assert forecast.remaining([first, second], {}) is None
    assert forecast.remaining([second, third], {first: 2.0}) == 2 * 13  # by work
    assert forecast.remaining([third], {first: 2.0, second: 3.0}) == 10  # the longest of its task
    assert forecast.remaining([scheme], {first: 2.0, scheme._replace(length=100, work=1.0): 5.0}) == 15  # of its scheme
    assert forecast.remaining([other], {first: 2.0, second: 10.0}) == 2 * 12 / 4  # of all together
    assert forecast.remaining([], {first: 2.0}) == 0


def test_a_long_evaluation_tells_how_much_time_is_left(params, data, tmp_path, monkeypatch):
    now, told = [0.0], []
    monkeypatch.setattr(runner.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Progress, "note", lambda self, text: told.append(text))
    monkeypatch.setattr(Progress, "advance", lambda self, text="", steps=1: told.append(text))
    add = AnswerLog.add

    def slow(self, key, **values):
        now[0] += values["length"]  # a second a token
        add(self, key, **values)

    monkeypatch.setattr(AnswerLog, "add", slow)
    monkeypatch.setattr(runner, "forward_flops", lambda model, rows, length: rows * length)
    config = EvalConfig(
        tasks=("needle_in_prose",), lengths=(512, 1024), questions=QuestionConfig(1, prose=(str(tmp_path / "*.txt"),))
    )  # fmt: skip

    def measured(workdir):
        told.clear()
        evaluate(params, MODEL, ExecutionConfig(), SCHEMES, data, config, trained=64, workdir=workdir)
        return told

    assert measured(tmp_path / "a") == [
        "needle_in_prose, none at 512",
        "needle_in_prose, none at 512, answer 1",
        *(
            f"needle_in_prose, none at 512, answer {i}; about {duration(512 * (5 - i) + 5 * 1024)} left" for i in range(2, 6)
        ),
        f"needle_in_prose, none at 1,024; about {duration(5 * 1024)} left",
        *(f"needle_in_prose, none at 1,024, answer {i}; about {duration(1024 * (5 - i))} left" for i in range(1, 6)),
    ]  # fmt: skip
    assert measured(tmp_path / "a") == ["needle_in_prose, none at 512", "needle_in_prose, none at 1,024"]  # all answers are there
