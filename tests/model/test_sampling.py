"""Sampling: transformers' warped probabilities, draws of the right distribution, and the same for a row in any company."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.model.sampling import Sampling, draw, warp

VOCAB = 50
CASES = [
    Sampling(0.7),
    Sampling(1.3, top_k=1),
    Sampling(0.5, top_k=7),
    Sampling(1.0, top_k=VOCAB),
    Sampling(1.0, top_k=10 * VOCAB),
    Sampling(1.0, top_p=0.9),
    Sampling(2.0, top_p=0.3),
    Sampling(1.0, top_p=1e-6),
    Sampling(1.0, top_p=1e-8),
    Sampling(1.0, top_k=5, top_p=0.8),
    Sampling(0.9, top_k=20, top_p=1.0),
]


def drawn(logits, sampling, steps):
    """Tokens `[steps, B]`."""
    step = jax.jit(lambda step: draw(jnp.asarray(logits), sampling.spec, sampling.numbers, step))
    return np.asarray(jax.lax.map(step, jnp.arange(steps)))


def shares(logits, sampling):
    """The warped probabilities."""
    return np.asarray(jax.nn.softmax(warp(jnp.asarray(logits), sampling.spec, sampling.numbers), axis=-1))


def reference(logits, sampling):
    """The same by transformers' own processors, in the order in which its `generate` puts them."""
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("transformers.generation.logits_process")
    chain = [library.TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k is not None:
        chain.append(library.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(library.TopPLogitsWarper(sampling.top_p))
    scores = torch.from_numpy(logits.copy())
    for processor in chain:
        scores = processor(None, scores)
    return torch.softmax(scores, -1).numpy()


@pytest.mark.parametrize("sampling", CASES, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_warped_probabilities_are_those_of_transformers(sampling, ties):
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((64, VOCAB), np.float32)
    if ties:
        logits = np.round(logits)
    found, wanted = shares(logits, sampling), reference(logits, sampling)
    if ties and sampling.top_p < 1:
        # Which of several equal tokens stand at the border is left to torch's sort, which is not stable; how many is not.
        found, wanted = np.sort(found), np.sort(wanted)
    np.testing.assert_array_equal(found > 0, wanted > 0)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("sampling", [Sampling(1.0, seed=3), Sampling(0.7, top_k=6), Sampling(1.5, top_k=9, top_p=0.8)], ids=str)
def test_draws_have_the_distribution(sampling):
    """Chi-square of 20,000 draws over 12 tokens, beyond its 99.9% point for neither row."""
    steps, logits = 20_000, np.random.default_rng(1).standard_normal((2, 12)).astype(np.float32)
    tokens, wanted = drawn(logits, sampling, steps), shares(logits, sampling)
    for row in range(2):
        counts, expected = np.bincount(tokens[:, row], minlength=12), steps * wanted[row]
        assert not counts[expected == 0].any()
        kept = expected > 0
        statistic = np.sum((counts[kept] - expected[kept]) ** 2 / expected[kept])
        freedom = kept.sum() - 1
        # Wilson and Hilferty's normal approximation to the 99.9% point.
        assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3


def test_rows_and_steps_draw_independently_of_one_another():
    logits = np.zeros((2, 2), np.float32)
    tokens = drawn(logits, Sampling(1.0), 20_000)
    for one, other in ((tokens[:, 0], tokens[:, 1]), (tokens[1:, 0], tokens[:-1, 0])):
        assert abs(np.mean(one == other) - 0.5) < 4 * 0.5 / np.sqrt(len(one))


def test_a_row_draws_the_same_in_any_company():
    sampling = Sampling(1.0, top_k=30, top_p=0.95, seed=7)
    logits = np.random.default_rng(2).standard_normal((5, VOCAB)).astype(np.float32)
    np.testing.assert_array_equal(drawn(logits, sampling, 50)[:, :2], drawn(logits[:2], sampling, 50))


def test_seeds_draw_differently():
    logits = np.zeros((1, 1000), np.float32)
    assert not np.array_equal(drawn(logits, Sampling(1.0, seed=1), 20), drawn(logits, Sampling(1.0, seed=2), 20))


def test_temperature_zero_or_a_tiny_top_p_takes_the_most_likely_token():
    logits = np.random.default_rng(3).standard_normal((4, VOCAB)).astype(np.float32)
    np.testing.assert_array_equal(drawn(logits, Sampling(top_k=3, top_p=0.5), 1)[0], logits.argmax(-1))
    np.testing.assert_array_equal(drawn(logits, Sampling(1.0, top_p=1e-8), 1)[0], logits.argmax(-1))


def test_what_is_a_number_compiles_nothing_again():
    assert Sampling(0.5, 4, 0.9, seed=1).spec == Sampling(0.8, 4, 0.7, seed=2).spec
    assert Sampling(0.5, top_p=1.0).spec != Sampling(0.5, top_p=0.9).spec


@pytest.mark.parametrize(
    "values, says",
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be a number of at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be a number of at least 0"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
        ({"seed": -1}, "seed=-1 must be from 0 to 4294967295"),
    ],
)
def test_values_out_of_range_are_refused(values, says):
    with pytest.raises(UserError, match=says):
        Sampling(**values)
