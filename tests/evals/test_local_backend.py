"""Answers of a model: alike with and without sharing what prompts begin with, whatever groups they are answered in."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from lcx.core.mesh import MeshConfig, make_mesh
from lcx.core.param_spec import shardings
from lcx.data.config import DataConfig
from lcx.data.tokenizers import tokenizers
from lcx.evals.answers import AnswerLog
from lcx.evals.backends import local
from lcx.evals.backends.branches import branches
from lcx.evals.backends.local import LocalBackend, told
from lcx.evals.base import Item, Materials
from lcx.evals.config import EvalConfig, QuestionConfig
from lcx.evals.tasks.table import TASKS
from lcx.model.architecture import build_schemes
from lcx.model.config import ModelConfig
from lcx.model.decode import generate
from lcx.model.execution import ExecutionConfig
from lcx.model.params import specs
from lcx.positions.registry import from_config
from tests.model.test_transformer import build
from tests.positions.test_registry import TEXTS

MODEL = ModelConfig(
    model_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, pattern=("local", "global"), window=40
)


def row(*parts):
    return np.concatenate([np.full(count, token, np.int32) for token, count in parts])


def test_branches():
    alike = [row((1, 50), (2, 10)), row((1, 50), (3, 30)), row((1, 50), (2, 12))]
    other = [row((4, 20)), row((5, 90))]
    assert branches([*alike, *other], 40) == [(50, [1, 2, 0]), (0, [4, 3])]
    # What two have in common is shared by two of three where that saves more.
    assert branches([row((1, 9), (2, 90), (n, 2)) for n in (3, 4)] + [row((1, 9), (5, 5))], 4) == [(99, [0, 1]), (0, [2])]
    assert branches(alike, 51) == [(59, [2, 0]), (0, [1])]
    assert branches(alike, 60) == [(0, [1, 2, 0])]
    # Something is left to go on with.
    assert branches([alike[0], alike[0]], 40) == [(59, [0, 1])]
    assert branches([], 1) == []


def answers(backend, items, new_tokens):
    found = {}
    for some in backend.complete(items, new_tokens):
        assert not set(found) & set(some)
        found |= some
    return [found[i] for i in range(len(items))]


@pytest.fixture(scope="module")
def weights():
    params, _, _ = build(MODEL, {"default": "rope:theta=500"}, length=4096)
    params["embed"]["embedding"] = params["embed"]["embedding"] * 4
    return params, build_schemes(MODEL, {"default": "rope:theta=500"})


def test_answers_are_kept_apart_by_the_type_they_were_computed_in(weights):
    params, schemes = weights
    executions = (ExecutionConfig(), ExecutionConfig(compute_dtype="bfloat16"), ExecutionConfig(remat="block"))
    plain, rounded, again = (LocalBackend(params, MODEL, one, schemes, 64).fingerprint for one in executions)
    assert plain == again != rounded


def test_answers_are_known_again_on_other_devices_and_not_for_other_weights(weights):
    params, schemes = weights

    def fingerprint(params):
        return LocalBackend(params, MODEL, ExecutionConfig(), schemes, 64).fingerprint

    plain = fingerprint(params)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    spread = jax.device_put(params, shardings(specs(MODEL, schemes, 64), mesh))
    assert any(not x.is_fully_replicated for x in jax.tree.leaves(spread))
    assert fingerprint(spread) == plain
    embedding = params["embed"]["embedding"]
    for other in (embedding[::-1], embedding[:, ::-1], embedding.at[3, 5].add(1e-6), -embedding):
        assert fingerprint({**params, "embed": {"embedding": other}}) != plain


def test_answers_are_known_again_under_the_same_model_and_scheme_alone(weights):
    params, _ = weights

    def fingerprint(positions="rope:theta=500", **model):
        config = dataclasses.replace(MODEL, **model)
        return LocalBackend(params, config, ExecutionConfig(), build_schemes(config, {"default": positions}), 64).fingerprint

    # None of these has other arrays.
    models = [
        {}, {"window": 39}, {"pattern": ("global",)}, {"attention_softcap": 50.0}, {"logit_softcap": 30.0}, {"query_scale": 0.1},
        {"norm_eps": 1e-5}, {"activation": "gelu"}, {"embedding_scale": True}, {"num_experts": 4}, 
        {"num_experts": 4, "experts_per_token": 1},
    ]  # fmt: skip
    schemes = [f"self_extend:window={window},group=4" for window in (16, 15)]
    schemes += [{"name": "rope", "temperature": {"kind": kind, "scale": 1.0, "length": 32}} for kind in ("log_n", "ministral")]
    found = [*(fingerprint(**model) for model in models), *map(fingerprint, schemes)]
    assert len(set(found)) == len(found)
    assert fingerprint(router_aux_weight=0.01, num_experts=4) == fingerprint(num_experts=4)


def test_schemes_are_told_alike_in_every_process():
    assert not any(" at 0x" in told(from_config(text).spec(16)) for text in TEXTS.values())


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 4])
def test_what_questions_have_in_common_is_computed_once(weights, rows, monkeypatch):
    params, schemes = weights
    computed = []

    def counted(*args, **kwargs):
        prefix = kwargs.get("prefix")
        computed.append(sum(map(len, args[3])) - (0 if prefix is None else len(args[3]) * len(prefix.tokens)))
        return generate(*args, **kwargs)

    monkeypatch.setattr(local, "generate", counted)
    config = EvalConfig(questions=QuestionConfig(2))
    task = TASKS["needle_in_prose"](Materials(config, DataConfig(), tokenizers.load("bytes"), None))
    # One more, which begins like no other.
    items = [*task.items(4096, 2), Item(row((7, 100)), row((1, 1)))]
    found, tokens = [], []
    for share in (True, False):
        computed.clear()
        backend = LocalBackend(
            params, MODEL, ExecutionConfig(), schemes, 4096, rows * 4096, tokenizers.load("bytes"), share_prefixes=share
        )
        found.append(answers(backend, items, 6))
        tokens.append(sum(computed))
    assert found[0] == found[1] and len(set(found[0])) > 1
    assert tokens[0] < 0.05 * tokens[1]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"context": 2}, {"context": 4, "ulysses": 2}])
def test_what_is_shared_is_the_same_on_a_mesh(weights, layout, devices):
    params, schemes = weights
    count = math.prod(layout.values()) // layout.get("ulysses", 1)
    mesh = make_mesh(MeshConfig(fsdp=1, **layout), devices[:count])
    split = jax.device_put(params, shardings(specs(MODEL, schemes, 1024), mesh))
    config = EvalConfig(questions=QuestionConfig(1))
    task = TASKS["needle_in_prose"](Materials(config, DataConfig(), tokenizers.load("bytes"), None))
    items = [*task.items(1024, 1), Item(row((7, 100)), row((1, 1)))]
    found = []
    for placed, share in ((params, False), (split, False), (split, True)):
        backend = LocalBackend(
            placed, MODEL, ExecutionConfig(), schemes, 1024, 4 * 1024, tokenizers.load("bytes"), share_prefixes=share
        )
        found.append(answers(backend, items, 6))
    assert found[0] == found[1] == found[2] and len(set(found[0])) > 1


def test_rows_are_the_same(weights):
    params, schemes = weights
    config = EvalConfig(questions=QuestionConfig(2))
    task = TASKS["needle_in_prose"](Materials(config, DataConfig(), tokenizers.load("bytes"), None))
    rows = []
    for share in (True, False):
        args = (params, MODEL, ExecutionConfig(), schemes, 1024, 2048, tokenizers.load("bytes"))
        rows.append(task.measure(LocalBackend(*args, share_prefixes=share), 1024, 2, AnswerLog(None)))
    assert rows[0] == rows[1]
