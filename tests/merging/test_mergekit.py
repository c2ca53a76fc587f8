"""Every method that draws nothing at random against mergekit, in float32: optional, as mergekit has an environment of its own.

python -m venv ENVIRONMENT && ENVIRONMENT/bin/pip install mergekit
MERGEKIT_PYTHON=ENVIRONMENT/bin/python python -m pytest tests/merging/test_mergekit.py
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from lcx.merging.merge import Merge
from lcx.merging.methods.table import METHODS
from tests.merging.folders import describe, load, make

PYTHON = os.environ.get("MERGEKIT_PYTHON")

SIZES = dict(vocab_size=160, hidden_size=128, intermediate_size=136, num_attention_heads=4, num_key_value_heads=2)
"""No tensor has fewer than 100 numbers: of a smaller one mergekit's breadcrumbs leave nothing."""

WEIGHTS = [0.3, 0.9, 0.5]
T = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]}, {"value": 0.5}]


def with_base(method, count, of_each=None, **own):
    """A merge of `count` fine-tunes; `of_each` holds their parameters, one value for all or one for each."""
    models = []
    for i in range(count):
        of_one = {key: value[i] if isinstance(value, list) else value for key, value in (of_each or {}).items()}
        models.append({"model": f"tuned{i}", "parameters": of_one})
    return {"merge_method": method, "base_model": "base", "models": models, "parameters": own}


def alone(method, count, of_each=None, **own):
    """The same without a base."""
    return {key: value for key, value in with_base(method, count, of_each, **own).items() if key != "base_model"}


def source(model, first, last, **parameters):
    return {"model": model, "layer_range": [first, last], "parameters": parameters}


CASES = {
    "linear": alone("linear", 3, {"weight": WEIGHTS}),
    "linear, not normalized": alone("linear", 2, {"weight": WEIGHTS}, normalize=False),
    "linear, gradients": alone("linear", 2, {"weight": [[0, 0.5, 1], 1]}),
    "linear, slices": {
        "merge_method": "linear",
        "slices": [
            {"sources": [source("tuned0", 0, 3, weight=[0, 1]), source("tuned1", 1, 4, weight=0.5)]},
            {"sources": [source("tuned1", 0, 2, weight=0.5), source("tuned2", 2, 4, weight=[0.25, 1])]},
        ],
    },
    "slerp": {**alone("slerp", 2, t=0.3), "base_model": "tuned0"},
    "slerp, by filters": {**alone("slerp", 2, t=T), "base_model": "tuned0"},
    "slerp, straight": with_base("slerp", 1, t=0.3) | {"models": [{"model": "base"}, {"model": "close"}]},
    "nuslerp": alone("nuslerp", 2, {"weight": WEIGHTS}),
    "nuslerp, with a base": with_base("nuslerp", 2, {"weight": WEIGHTS}),
    "nuslerp, last axis": with_base("nuslerp", 2, {"weight": WEIGHTS}, nuslerp_flatten=False),
    "nuslerp, first axis": alone("nuslerp", 2, {"weight": WEIGHTS}, nuslerp_flatten=False, nuslerp_row_wise=True),
    "multislerp": alone("multislerp", 3, {"weight": WEIGHTS}),
    "multislerp, with a base": with_base("multislerp", 3, {"weight": WEIGHTS}),
    "multislerp, not normalized": with_base("multislerp", 3, {"weight": WEIGHTS}, normalize_weights=False),
    "karcher": alone("karcher", 3),
    "karcher, of two": alone("karcher", 2, max_iter=3),
    "task_arithmetic": with_base("task_arithmetic", 2, {"weight": WEIGHTS}, **{"lambda": 0.7}),
    "task_arithmetic, normalized": with_base("task_arithmetic", 2, {"weight": WEIGHTS}, normalize=True),
    "ties": with_base("ties", 3, {"weight": WEIGHTS}),
    "ties, trimmed": with_base("ties", 3, {"weight": [0.3, 0.9, -0.5], "density": [0.5, 0.3, 0.7]}, **{"lambda": 1.2}),
    "ties, not normalized": with_base("ties", 2, {"weight": WEIGHTS, "density": 0.2}, normalize=False),
    "ties, slices": {
        "merge_method": "ties", "base_model": "base",
        "slices": [{
            "sources": [source("base", 0, 3), source("tuned0", 1, 4, weight=[0.2, 1], density=0.5), source("tuned1", 0, 3, weight=2)
            ],
            "parameters": {"lambda": 0.5},
        }],
    },
    "dare_linear, density 1": with_base("dare_linear", 2, {"weight": WEIGHTS}),
    "dare_ties, density 1": with_base("dare_ties", 2, {"weight": WEIGHTS}),
    "dare_ties, density 1, normalized": with_base("dare_ties", 2, {"weight": WEIGHTS}, normalize=True),
    "breadcrumbs": with_base("breadcrumbs", 2, {"weight": WEIGHTS, "density": 0.5}),
    "breadcrumbs, nothing to drop": with_base("breadcrumbs", 2, {"weight": WEIGHTS}),
    "breadcrumbs, gamma": with_base("breadcrumbs", 2, {"weight": WEIGHTS, "density": [0.9, 0.995], "gamma": [0.05, 0.02]}),
    "breadcrumbs_ties": with_base("breadcrumbs_ties", 3, {"weight": WEIGHTS, "density": 0.5}),
    "sce": with_base("sce", 3),
    "sce, of one": with_base("sce", 1, select_topk=0.4),
    "sce, selected": with_base("sce", 3, select_topk=0.4),
    "model_stock": with_base("model_stock", 3),
    "model_stock, by rows": with_base("model_stock", 2, filter_wise=True),
    "arcee_fusion": with_base("arcee_fusion", 1),
    "nearswap": with_base("nearswap", 1, t=0.03),
    "passthrough": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [source("tuned0", 0, 3)]},
            {"sources": [source("tuned1", 1, 4, scale=[{"filter": "o_proj", "value": 0.5}, {"value": 1.0}])]},
        ],
    },
}  # fmt: skip


DRAWN = {
    name: with_base(name, 1) | {"models": [{"model": "tuned2", "parameters": {**given, "weight": 1}}]}
    for name, given in {
        "dare_linear": {"density": 0.4},
        "dare_ties": {"density": 0.4},
        "della_linear": {"density": 0.4, "epsilon": 0.3},
        "della": {"density": 0.4, "epsilon": 0.3},
    }.items()
}
"""Masks that cannot be the same: the share that is kept, by rank, and the formula on the mask that was drawn are."""


def test_every_method_that_draws_nothing_has_a_case():
    assert {case["merge_method"] for case in CASES.values()} >= METHODS.keys() - DRAWN.keys()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The folder in which mergekit has merged all cases, each in a folder of its number."""
    if PYTHON is None:
        pytest.skip("set MERGEKIT_PYTHON to an interpreter that mergekit is installed for")
    root = tmp_path_factory.mktemp("mergekit")
    base = make(root / "base", **SIZES)
    make(root / "close", seed=9, near=base, scale=0.01, **SIZES)
    for i in range(3):
        make(root / f"tuned{i}", seed=i + 1, near=base, scale=0.1 * (i + 1), **SIZES)
    words = []
    for i, case in enumerate([*CASES.values(), *DRAWN.values()]):
        words += [describe(root / f"{i}.yml", **_placed(case, root), dtype="float32"), root / str(i)]
    side = Path(__file__).with_name("mergekit_side.py")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([PYTHON, side, *words], check=True, env=env, capture_output=True)
    return root


def _placed(given, root):
    """The same with models' names as paths."""
    if isinstance(given, dict):
        names = ("model", "base_model")
        return {key: str(root / value) if key in names else _placed(value, root) for key, value in given.items()}
    return [_placed(one, root) for one in given] if isinstance(given, list) else given


@pytest.mark.slow
@pytest.mark.parametrize("number, case", enumerate(CASES), ids=CASES)
def test_the_result_is_mergekits(number, case, theirs, tmp_path):
    Merge(theirs / f"{number}.yml").write(tmp_path / "out")
    found, wanted = load(tmp_path / "out"), load(theirs / str(number))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("number, case", enumerate(DRAWN, len(CASES)), ids=DRAWN)
def test_random_masks_are_drawn_and_rescaled_as_mergekits(number, case, theirs, tmp_path):
    Merge(theirs / f"{number}.yml").write(tmp_path / "out")
    base, tuned, ours, others = (load(x) for x in (theirs / "base", theirs / "tuned2", tmp_path / "out", theirs / str(number)))
    kept_by_rank: list[list[float]] = [[], []]
    for name in ours:
        delta = (tuned[name] - base[name]).astype(np.float64)
        for side, found in enumerate((ours[name], others[name])):
            kept = found != base[name]
            factor = np.abs(delta).sum() / np.abs(delta[kept]).sum()
            np.testing.assert_allclose(found, base[name] + factor * delta * kept, rtol=1e-6, atol=2e-6, err_msg=name)
            rank = np.argsort(np.argsort(np.abs(delta), axis=-1), axis=-1) / (delta.shape[-1] - 1)
            kept_by_rank[side].append([kept[(low <= rank) & (rank < low + 0.25)].mean() for low in (0, 0.25, 0.5, 0.75)])
    shares = [np.mean(found, axis=0) for found in kept_by_rank]
    wanted = np.full(4, 0.4) if "dare" in case else 0.1 + 0.6 * np.array([0.125, 0.375, 0.625, 0.875])
    for found in shares:
        np.testing.assert_allclose(found, wanted, atol=0.02)
