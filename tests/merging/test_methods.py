"""Every method against its formula in float64, whole and in blocks; and the traps of each formula."""

import dataclasses

import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.merging import tensors
from lcx.merging.methods.pairs import importance
from lcx.merging.methods.sparse import row_ranks
from lcx.merging.methods.table import METHODS
from lcx.merging.tensors import threads
from tests.merging.arrays import drawn, fine_tunes, merged, weights

SHAPE = (12, 10)


@pytest.fixture(params=[1 << 18, 20], ids=["whole", "blocks"], autouse=True)
def block(request, monkeypatch):
    """All in one block, or two rows in each."""
    monkeypatch.setattr(tensors, "BLOCK", request.param)


def close(found, wanted, tolerance=1e-6):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(1.0, np.abs(wanted).max()))


def float64(*arrays):
    return [array.astype(np.float64) for array in arrays]


def unit(x):
    return x / np.sqrt((x * x).sum())


def between(a, b, t):
    """Shoemake's formula on tensors as they are, with the angle of their directions."""
    angle = np.arccos((unit(a) * unit(b)).sum())
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def signed_mean(deltas, weights, divide=True):
    """TIES' election, entry by entry."""
    total = np.zeros_like(deltas[0])
    for place in np.ndindex(total.shape):
        entries = [(weight * delta[place], weight) for delta, weight in zip(deltas, weights, strict=True)]
        sign = 1 if sum(entry for entry, _ in entries) >= 0 else -1
        kept = [(entry, weight) for entry, weight in entries if entry * sign > 0]
        divisor = sum(weight for _, weight in kept) if divide and kept else 1
        total[place] = sum(entry for entry, _ in kept) / divisor
    return total


def top(delta, k):
    """The k largest entries of an array, the others 0."""
    order = np.argsort(-np.abs(delta).reshape(-1), kind="stable")
    kept = np.zeros(delta.size)
    kept[order[:k]] = 1
    return delta * kept.reshape(delta.shape)


def outstanding(numbers):
    """Median and 1.5 interquartile ranges, where a quantile that lies between two numbers is the lower one."""
    low, middle, high = (np.sort(numbers)[int(share * (numbers.size - 1))] for share in (0.25, 0.5, 0.75))
    return middle + 1.5 * (high - low)


def test_linear():
    _, (a, b) = fine_tunes(2, *SHAPE)
    close(merged("linear", [a, b], each=weights(0.3, 0.9)), 0.25 * a + 0.75 * b)
    close(merged("linear", [a, b], each=weights(0.3, 0.9), normalize=False), 0.3 * a + 0.9 * b)


def test_weights_that_sum_to_nothing_are_refused_where_they_are_divided_by_their_sum():
    _, (a, b) = fine_tunes(2, *SHAPE)
    with pytest.raises(UserError, match=r"layers.0.weight: the weights \[1.0, -1.0\] sum to 0; change one of them"):
        merged("linear", [a, b], each=weights(1.0, -1.0))
    close(merged("linear", [a, b], each=weights(1.0, -1.0), normalize=False), a.astype(np.float64) - b)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_keeps_the_lengths_of_raw_tensors(t):
    a, b = drawn(*SHAPE), drawn(*SHAPE, seed=1, scale=4.0)
    close(merged("slerp", [b], a, t=t), between(*float64(a, b), t))


@pytest.mark.parametrize("angle, straight", [(0.0310, True), (0.0325, False)])
def test_slerp_goes_in_a_straight_line_beyond_a_cosine_of_0_9995(angle, straight):
    a = unit(drawn(*SHAPE).astype(np.float64))
    other = drawn(*SHAPE, seed=1).astype(np.float64)
    b = 3 * (np.cos(angle) * a + np.sin(angle) * unit(other - (other * a).sum() * a))
    assert (np.cos(angle) > 0.9995) == straight
    a, b = (x.astype(np.float32) for x in (50 * a, 50 * b))
    line, arc = 0.5 * a.astype(np.float64) + 0.5 * b, between(*float64(a, b), 0.5)
    assert np.abs(line - arc).max() > 1e-3
    close(merged("slerp", [b], a, t=0.5), line if straight else arc, 1e-7)


def test_slerp_of_opposite_and_of_empty_tensors_is_finite():
    a = drawn(*SHAPE)
    close(merged("slerp", [-a], a, t=0.25), 0.5 * a)
    close(merged("slerp", [np.zeros_like(a)], a, t=0.5), np.sin(np.pi / 4) * a)


def test_nuslerp_of_whole_tensors_and_of_what_they_add_to_a_base():
    base, (a, b) = fine_tunes(2, *SHAPE)
    close(merged("nuslerp", [a, b], each=weights(0.3, 0.9)), between(*float64(a, b), 0.75))
    deltas = float64(a - base, b - base)
    close(merged("nuslerp", [a, b], base, each=weights(0.3, 0.9)), base + between(*deltas, 0.75))


@pytest.mark.parametrize("row_wise, axis", [(False, 1), (True, 0)])
def test_nuslerp_along_an_axis(row_wise, axis):
    base, (a, b) = fine_tunes(2, *SHAPE)
    lines = [np.moveaxis(x, axis, 1) for x in float64(a, b)]
    wanted = np.moveaxis(np.stack([between(x, y, 0.6) for x, y in zip(*lines, strict=True)]), 1, axis)
    close(merged("nuslerp", [a, b], each=weights(2, 3), nuslerp_flatten=False, nuslerp_row_wise=row_wise), wanted)


def test_nuslerp_where_weights_sum_to_nothing_goes_half_way():
    _, (a, b) = fine_tunes(2, *SHAPE)
    close(merged("nuslerp", [a, b], each=weights(1.0, -1.0)), between(*float64(a, b), 0.5))


@pytest.mark.parametrize("flatten", [True, False])
def test_nuslerp_of_equal_tensors_is_that_tensor(flatten):
    a = drawn(*SHAPE)
    close(merged("nuslerp", [a, a], each=weights(1, 3), nuslerp_flatten=flatten), a)
    close(merged("nuslerp", [a, a], a, each=weights(1, 3), nuslerp_flatten=flatten), a)


def test_multislerp():
    base, models = fine_tunes(3, *SHAPE)
    shares = np.array([0.2, 0.3, 0.5])
    for start, vectors in ((0.0, float64(*models)), (base, float64(*(model - base for model in models)))):
        units = [unit(x) for x in vectors]
        mean = unit(sum(share * x for share, x in zip(shares, units, strict=True)))
        tangent = sum(share * (x - (x * mean).sum() * mean) for share, x in zip(shares, units, strict=True))
        way = np.sqrt((tangent**2).sum())
        length = sum(share * np.sqrt((x**2).sum()) for share, x in zip(shares, vectors, strict=True))
        wanted = start + length * (np.cos(way) * mean + np.sin(way) * tangent / way)
        close(merged("multislerp", models, None if np.isscalar(start) else base, each=weights(*(2 * shares))), wanted)


def test_multislerp_of_tensors_that_cancel_out_is_finite():
    a = drawn(*SHAPE)
    close(merged("multislerp", [a, -a], each=weights(1, 1)), 0 * a)


def test_karcher_is_where_the_tangents_cancel_out():
    _, models = fine_tunes(3, *SHAPE, scale=1.0)
    units = [unit(x) for x in float64(*models)]
    found = merged("karcher", models, max_iter=100, tol=1e-12).astype(np.float64)
    length = np.mean([np.sqrt((x.astype(np.float64) ** 2).sum()) for x in models])
    assert np.sqrt((found**2).sum()) == pytest.approx(length, rel=1e-6)
    mean = unit(found)
    angles = [np.arccos((x * mean).sum()) for x in units]
    tangents = [angle / np.sin(angle) * (x - np.cos(angle) * mean) for x, angle in zip(units, angles, strict=True)]
    assert np.abs(sum(tangents)).max() < 1e-6


def test_karcher_of_two_is_slerp_of_their_directions():
    _, (a, b) = fine_tunes(2, *SHAPE, scale=1.0)
    length = (np.linalg.norm(a) + np.linalg.norm(b)) / 2
    close(merged("karcher", [a, b]), length * between(*(unit(x) for x in float64(a, b)), 0.5))


def test_karcher_leaves_out_tensors_without_a_direction():
    a = drawn(*SHAPE)
    close(merged("karcher", [a, np.zeros_like(a)]), a)
    close(merged("karcher", [0 * a, 0 * a]), 0 * a)


def test_task_arithmetic_does_not_divide_by_the_weights_unless_told():
    base, (a, b) = fine_tunes(2, *SHAPE)
    change = 0.3 * (a - base).astype(np.float64) + 0.9 * (b - base)
    close(merged("task_arithmetic", [a, b], base, each=weights(0.3, 0.9), **{"lambda": 0.7}), base + 0.7 * change)
    close(merged("task_arithmetic", [a, b], base, each=weights(0.3, 0.9), normalize=True), base + change / 1.2)


def test_ties():
    base, models = fine_tunes(3, *SHAPE)
    deltas = [top(delta, k) for delta, k in zip(float64(*(m - base for m in models)), (60, 36, 84), strict=True)]
    each = [{"weight": w, "density": d} for w, d in zip((0.3, 0.9, -0.5), (0.5, 0.3, 0.7), strict=True)]
    close(merged("ties", models, base, each=each, **{"lambda": 1.2}), base + 1.2 * signed_mean(deltas, (0.3, 0.9, -0.5)))
    close(merged("ties", models, base, each=each, normalize=False), base + signed_mean(deltas, (0.3, 0.9, -0.5), divide=False))


def test_ties_trims_nothing_by_default():
    base, models = fine_tunes(2, *SHAPE)
    close(merged("ties", models, base, each=weights(1, 1)), base + signed_mean(float64(*(m - base for m in models)), (1, 1)))


def test_ties_takes_plus_where_signs_are_in_balance():
    base = np.zeros(SHAPE, np.float32)
    one = np.full(SHAPE, 0.5, np.float32)
    close(merged("ties", [-one, one], base, each=weights(1, 1)), one)


def test_ties_keeps_exactly_as_many_entries_where_sizes_are_equal():
    base = np.zeros(SHAPE, np.float32)
    equal = np.where(np.arange(120).reshape(SHAPE) % 2, -1, 1).astype(np.float32)
    found = merged("ties", [equal], base, each=[{"weight": 1.0, "density": 0.4}])
    assert np.array_equal(found, np.where(np.arange(120).reshape(SHAPE) < 48, equal, 0))


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method.base == "needed"))
def test_models_that_change_nothing_leave_the_base_as_it_is(name):
    base = drawn(*SHAPE)
    method = METHODS[name]
    one = {key: 0.5 for key in ("weight", "density") if key in method.parameters}
    own = {"t": 0.5} if "t" in method.parameters else {}
    models = [base.copy() for _ in range(max(2, method.least) if method.most is None else method.most)]
    close(merged(name, models, base, each=[one] * len(models), **own), base)


def test_breadcrumbs_drops_the_largest_and_the_smallest():
    base, models = fine_tunes(2, *SHAPE)
    deltas = [top(delta, 12 + 60) - top(delta, 12) for delta in float64(*(m - base for m in models))]
    each = [{"weight": weight, "density": 0.5, "gamma": 0.1} for weight in (0.3, 0.9)]
    close(merged("breadcrumbs", models, base, each=each), base + 0.3 * deltas[0] + 0.9 * deltas[1])
    close(merged("breadcrumbs_ties", models, base, each=each), base + signed_mean(deltas, (0.3, 0.9), divide=False))


def test_breadcrumbs_of_a_tensor_so_small_that_its_share_is_less_than_one_drops_none_of_the_largest():
    base, (model,) = fine_tunes(1, 90)
    found = merged("breadcrumbs", [model], base, each=[{"weight": 1.0, "density": 0.5}])
    close(found, base + top((model - base).astype(np.float64), 45))


def test_breadcrumbs_drops_fewer_of_the_largest_where_more_is_to_be_left():
    base, (model,) = fine_tunes(1, *SHAPE)
    close(merged("breadcrumbs", [model], base, each=[{"weight": 1.0, "gamma": 0.1}]), model)
    found = merged("breadcrumbs", [model], base, each=[{"weight": 1.0, "density": 0.95, "gamma": 0.1}])
    delta = (model - base).astype(np.float64)
    close(found, base + delta - top(delta, 6))


@pytest.mark.parametrize("rescale_by", ["l1", "density"])
def test_dare_rescales_by_its_own_mask_or_by_the_density(rescale_by):
    base, (model,) = fine_tunes(1, 120, 100)
    found = merged("dare_linear", [model], base, each=[{"weight": 1.0, "density": 0.3}], rescale_by=rescale_by)
    delta, change = (model - base).astype(np.float64), found.astype(np.float64) - base
    kept = change != 0
    assert kept.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / kept.size))
    factor = 1 / 0.3 if rescale_by == "density" else np.abs(delta).sum() / np.abs(delta[kept]).sum()
    close(found, base + factor * delta * kept)
    if rescale_by == "l1":
        assert factor != pytest.approx(1 / 0.3, rel=1e-5)
        assert np.abs(change).sum() == pytest.approx(np.abs(delta).sum(), rel=1e-5)


def test_dare_without_rescaling_and_with_election():
    base, models = fine_tunes(3, *SHAPE)
    each = [{"weight": weight, "density": 0.6} for weight in (0.3, 0.9, 0.5)]
    apart = [{**one, "weight": float(i == j)} for j in range(3) for i, one in enumerate(each)]
    kept = [merged("dare_linear", models, base, each=apart[3 * i : 3 * i + 3], rescale=False) != base for i in range(3)]
    deltas = [mask * (m - base).astype(np.float64) for mask, m in zip(kept, models, strict=True)]
    found = merged("dare_ties", models, base, each=each, rescale=False)
    close(found, base + signed_mean(deltas, (0.3, 0.9, 0.5), divide=False))


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_masks_depend_on_seed_tensor_and_model_alone(name):
    base, models = fine_tunes(2, *SHAPE)
    each = [{"weight": 1.0, "density": 0.5}] * 2
    first = merged(name, models, base, each=each)
    assert np.array_equal(first, merged(name, models, base, each=each))
    with threads() as executor:
        assert np.array_equal(first, merged(name, models, base, each=each, executor=executor))
    assert not np.array_equal(first, merged(name, models, base, each=each, seed=1))
    assert not np.array_equal(first, merged(name, models, base, each=each, tensor="layers.1.weight"))
    alike = merged("dare_linear", [models[0], models[0]], base, each=each, rescale=False) - base
    delta = models[0] - base
    counts = np.round(alike / delta)
    assert set(np.unique(counts)) == {0, 1, 2}


def test_della_keeps_the_larger_entries_of_a_row_with_the_higher_probability():
    base, (model,) = fine_tunes(1, 4000, 11)
    found = merged("della_linear", [model], base, each=[{"weight": 1.0, "density": 0.5, "epsilon": 0.4}], rescale=False)
    ranks = np.argsort(np.argsort(np.abs(model - base), axis=1), axis=1)
    shares = [(found != base)[ranks == rank].mean() for rank in range(11)]
    assert shares == pytest.approx(np.linspace(0.1, 0.9, 11), abs=0.04)


def test_della_of_rows_of_one_keeps_with_the_density():
    assert np.array_equal(row_ranks(np.ones((3, 1), np.float32)), np.full((3, 1), 0.5))
    assert np.array_equal(row_ranks(np.array([[3.0, 1.0, 2.0]])), [[1.0, 0.0, 0.5]])
    base, (model,) = fine_tunes(1, 4000, 1)
    found = merged("della", [model], base, each=[{"weight": 1.0, "density": 0.5}])
    assert np.isfinite(found).all()
    assert (found != base).mean() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("density, epsilon", [(1.0, 0.15), (0.1, 0.15), (0.5, 0.5)])
def test_della_refuses_probabilities_beyond_0_and_1(density, epsilon):
    base, (model,) = fine_tunes(1, *SHAPE)
    with pytest.raises(UserError, match=f"density={density:g} and epsilon={epsilon:g}: .* must lie between 0 and 1"):
        merged("della", [model], base, each=[{"weight": 1.0, "density": density, "epsilon": epsilon}])


@pytest.mark.parametrize("share", [1.0, 0.35])
def test_sce_weighs_by_squares_and_elects_by_unweighted_sums(share):
    base, models = fine_tunes(3, *SHAPE)
    models[0] = base + 3 * (models[0] - base)
    models = [np.where(np.arange(120).reshape(SHAPE) < 20, base, m) for m in models]  # where no model differs
    deltas = np.stack(float64(*(m - base for m in models)))
    variance = deltas.var(axis=0)
    if share < 1:
        deltas *= top(variance, int(share * 100)) != 0
    squares = (deltas**2).mean(axis=(1, 2))
    shares = squares / squares.sum()
    positive = deltas.sum(axis=0) >= 0
    kept = np.where(positive, deltas > 0, deltas < 0)
    divisor = (shares[:, None, None] * kept).sum(axis=0)
    total = (shares[:, None, None] * kept * deltas).sum(axis=0) / np.where(divisor > 0, divisor, 1)
    close(merged("sce", models, base, select_topk=share), base + total)


def test_model_stock():
    base, models = fine_tunes(3, *SHAPE)
    models = [m + 0.3 * drawn(*SHAPE, seed=9) for m in models]  # what they have in common
    deltas = float64(*(m - base for m in models))
    cosine = np.mean([(unit(a) * unit(b)).sum() for a, b in ((deltas[i], deltas[j]) for i in range(3) for j in range(i))])
    t = 3 * cosine / (1 + 2 * cosine)
    close(merged("model_stock", models, base), t * np.mean(float64(*models), axis=0) + (1 - t) * base)


def test_model_stock_by_rows():
    base, models = fine_tunes(2, *SHAPE)
    models = [m + 0.3 * drawn(*SHAPE, seed=9) for m in models]
    one, two = float64(*(m - base for m in models))
    cosine = np.array([[(unit(x) * unit(y)).sum()] for x, y in zip(one, two, strict=True)])
    t = 2 * cosine / (1 + cosine)
    close(merged("model_stock", models, base, filter_wise=True), base + t * (one + two) / 2)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_of_opposite_fine_tunes_is_the_base(filter_wise):
    base, delta = drawn(*SHAPE), drawn(*SHAPE, seed=1)
    close(merged("model_stock", [base + delta, base - delta], base, filter_wise=filter_wise), base)
    still = merged("model_stock", [base + delta, base - 0.9 * delta], base, filter_wise=filter_wise)
    close(still, base)


def test_arcee_fusion_takes_outstanding_entries():
    base, (model,) = fine_tunes(1, *SHAPE)
    a, b = float64(model, base)
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (a, b))
    wanted = np.abs(a - b) * (p * np.log(p / q)).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(importance(base, model), wanted, rtol=1e-5)
    threshold = outstanding(wanted.reshape(-1))
    found = merged("arcee_fusion", [model], base)
    assert 0 < (wanted >= threshold).sum() < 40
    assert np.array_equal(found, np.where(wanted >= threshold, model, base))


def test_arcee_fusion_of_a_large_tensor_looks_at_a_sample(monkeypatch):
    monkeypatch.setattr("lcx.merging.methods.pairs.SAMPLE", 50)
    base, (model,) = fine_tunes(1, *SHAPE)
    sample = importance(base, model).reshape(-1)[::3]
    threshold = outstanding(sample)
    assert np.array_equal(merged("arcee_fusion", [model], base), np.where(importance(base, model) >= threshold, model, base))


def test_nearswap_moves_by_at_most_t():
    base, (model,) = fine_tunes(1, *SHAPE)
    model[0] = base[0]  # |a - b| = 0
    gap = np.abs(model.astype(np.float64) - base)
    share = np.clip(np.divide(0.2, gap, out=np.ones_like(gap), where=gap > 0), 0, 1)
    close(merged("nearswap", [model], base, t=0.2), base + share * (model.astype(np.float64) - base))


def test_passthrough():
    a = drawn(*SHAPE)
    assert np.array_equal(merged("passthrough", [a]), a)
    close(merged("passthrough", [a], each=[{"scale": 0.5}]), 0.5 * a)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(7,), (1,), (3, 1), (0, 4), (2, 3, 5)])
def test_every_method_takes_tensors_of_any_shape(name, shape):
    method = METHODS[name]
    base, models = fine_tunes(3, *shape)
    models = models[: method.most or 3]
    each = [{key: 0.5 for key in ("weight", "density") if key in method.parameters}] * len(models)
    own = {"t": 0.5} if "t" in method.parameters else {}
    found = merged(name, models, None if method.base == "none" else base, each=each, **own)
    assert found.shape == shape and np.isfinite(found).all()


def test_defaults_are_mergekits():
    defaults = {name: {key: one.default for key, one in method.parameters.items()} for name, method in METHODS.items()}
    assert defaults["linear"] == {"weight": None, "normalize": True}
    assert defaults["slerp"] == {"t": None}
    assert defaults["ties"] == {"weight": None, "density": 1.0, "lambda": 1.0, "normalize": True}
    assert {name: defaults[name]["normalize"] for name in defaults if "density" in defaults[name]} == {
        "ties": True, "dare_linear": False, "dare_ties": False, "della": True, "della_linear": False,
        "breadcrumbs": False, "breadcrumbs_ties": False,
    }  # fmt: skip
    assert defaults["breadcrumbs"]["gamma"] == 0.01 and defaults["della"]["epsilon"] == 0.15
    assert defaults["dare_ties"]["rescale"] is True and defaults["dare_ties"]["rescale_by"] == "l1"
    assert defaults["sce"] == {"select_topk": 1.0}
    assert defaults["karcher"] == {"max_iter": 10, "tol": 1e-5}
    assert defaults["multislerp"] == {"weight": None, "normalize_weights": True, "eps": 1e-8}
    assert defaults["nearswap"] == {"t": None}
    assert all(dataclasses.is_dataclass(method) for method in METHODS.values())
