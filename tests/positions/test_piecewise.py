import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.core.batch import Index
from lcx.core.errors import UserError
from lcx.core.mask import Mask, visible
from lcx.positions.piecewise import DualChunk, LeakyRerope, Rerope, SelfExtend
from lcx.positions.rotary import Rope, tables
from lcx.positions.scaling import Yarn
from lcx.positions.scheme import Heads
from lcx.positions.xpos import Xpos

HEADS = Heads(num_heads=4, num_kv_heads=2, head_dim=16, model_dim=64)
T = 40


def relative(scheme, i, j):
    """The relative position that the papers give to query i and key j <= i."""
    match scheme:
        case SelfExtend(window=w, group=g):
            return i - j if i - j < w else i // g - j // g + w - w // g
        case Rerope(window=w):
            return min(i - j, w)
        case LeakyRerope(window=w, k=k):
            return i - j if i - j < w else w + (i - j - w) / k
        case DualChunk(original_length=c, chunk=s):
            key, chunks = j % s, i // s - j // s
            query = i % s if chunks == 0 else min(i % s + s, c - 1) if chunks == 1 else c - 1
            return query - key
    raise AssertionError(scheme)


SCHEMES = [
    SelfExtend(window=7, group=3),
    SelfExtend(window=8, group=4),
    SelfExtend(window=4, group=1),
    Rerope(window=6),
    LeakyRerope(window=6, k=4.0),
    LeakyRerope(window=7, k=2.5),
    DualChunk(original_length=10, chunk=6),
    DualChunk(original_length=16, chunk=12),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize("scaled", [False, True])
def test_relative_positions_against_a_table(scheme, scaled):
    inner = Yarn(theta=scheme.theta, factor=4.0, original_length=16) if scaled else Rope(theta=scheme.theta)
    scheme = dataclasses.replace(scheme, scaling=inner if scaled else None)
    spec, length = scheme.spec(T), T
    index = Index.dense(1, T)
    made = tables(spec, scheme.buffers(HEADS, length), index.positions)
    frequencies, amplitude = inner.inverse_frequencies(16, length), inner.amplitude(length)
    covered = np.zeros((T, T), int)
    for region in spec.regions:
        seen = np.asarray(visible(Mask(causal=True, band=region.band), index, index))[0]
        covered += seen
        q_cos, q_sin = (np.asarray(x[0], np.float64) for x in made[region.q_rotation])
        raw = np.ones_like(q_cos), np.zeros_like(q_cos)
        k_cos, k_sin = (np.asarray(x[0], np.float64) for x in made[region.k_rotation]) if region.k_rotation else raw
        # cos and sin of the angle between query and key, times both amplitudes.
        cos = q_cos[:, None] * k_cos[None] + q_sin[:, None] * k_sin[None]
        sin = q_sin[:, None] * k_cos[None] - q_cos[:, None] * k_sin[None]
        angle = np.asarray([relative(scheme, i, j) for i, j in zip(*np.nonzero(seen), strict=True)])[:, None] * frequencies
        np.testing.assert_allclose(cos[seen], amplitude**2 * np.cos(angle), atol=1e-6)
        np.testing.assert_allclose(sin[seen], amplitude**2 * np.sin(angle), atol=1e-6)
    # Every visible pair belongs to exactly one region.
    assert np.array_equal(covered, np.tri(T, dtype=int))


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_no_relative_position_exceeds_the_reach(scheme):
    longest = max(relative(scheme, i, j) for i in range(T) for j in range(i + 1))
    match scheme:
        case SelfExtend(window=w, group=g):
            assert longest <= max(w, -(-T // g) + w - w // g)
        case Rerope(window=w):
            assert longest == w
        case DualChunk(original_length=c):
            assert longest == c - 1


def test_published_queries_of_dual_chunk():
    scheme = DualChunk(original_length=10, chunk=6)
    rotation = scheme.rotations(HEADS, 64)["successive"]
    assert np.asarray(rotation.position_map(jnp.arange(6, 12, dtype=jnp.uint32))).tolist() == [6, 7, 8, 9, 9, 9]
    assert DualChunk(original_length=4096).sizes() == (4096, 3072)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_theta_and_paces_change_arrays_alone(scheme):
    changes = {"theta": 500.0} | ({"k": 8.0} if isinstance(scheme, LeakyRerope) else {})
    changes |= {"group": 5} if isinstance(scheme, SelfExtend) else {}
    changed = dataclasses.replace(scheme, **changes)
    assert changed.spec(T) == scheme.spec(T) and hash(changed.spec(T)) == hash(scheme.spec(T))
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), s.buffers(HEADS, T)) for s in (scheme, changed)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SelfExtend(window=0, group=2), "window=0"),
        (lambda: SelfExtend(window=4, group=0), "group=0"),
        (lambda: LeakyRerope(window=4, k=0.5), "k=0.5"),
        (lambda: DualChunk().spec(64), "needs dual_chunk.original_length"),
        (lambda: DualChunk(original_length=8, chunk=8), "chunk=8 must be below"),
        (lambda: Rerope(window=4, scaling=Xpos()), "several rotations"),
        (lambda: Rerope(window=4, theta=500.0, scaling=Rope()), "must be equal"),
        (lambda: Rerope(window=4).to_hf(), "no Hugging Face"),
    ],
)
def test_bad_settings_are_named(make, says):
    with pytest.raises(UserError, match=says):
        make()
