"""The TPU kernel, interpreted on the host, against dense in value and in every gradient; on one device and on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.attention.dense import dense
from lcx.attention.pallas.flash import flash
from lcx.attention.spec import Blocks
from lcx.core.mask import Mask, visible
from lcx.core.mesh import MeshConfig, make_mesh
from tests.attention import cases, context_cases
from tests.attention.cases import call, errors, within
from tests.attention.test_blockwise import chunk_index, draw
from tests.quick import mostly_slow

# Every option of `cases.OPTIONS` that the kernel serves, in few programs, over several kinds of rows each.
PLAIN = {"mask": "causal", "bias": "none", "pieces": "one", "grouping": "gqa", "softcap": None, "sink": False}
ALIBI = {**PLAIN, "mask": "window", "bias": "alibi", "softcap": 5.0}
STRUCTURES = (
    PLAIN,
    {**ALIBI, "grouping": "mqa"},
    {**PLAIN, "mask": "prefix", "pieces": "self_extend", "grouping": "mha", "sink": True},
    {**PLAIN, "mask": "full", "bias": "alibi", "pieces": "dual_chunk", "sink": True},
)
ROWS = (("none", "continuous"), ("packed", "reset"), ("shared", "reset"), ("padding", "continuous"))
QUICK = (PLAIN,)
"""A structure is one program and takes its time to compile; the second one's is also that of `check_split`."""


def over_rows(quick):
    """Every structure over every kind of rows; those that are not `quick` are for `make test-all`."""
    return [
        pytest.param(
            {**structure, "segments": segments, "positions": positions}, marks=[pytest.mark.slow] * (structure not in quick)
        )
        for structure in STRUCTURES
        for segments, positions in ROWS
    ]


@pytest.mark.parametrize("case", over_rows(QUICK), ids=lambda case: "-".join(str(value) for value in case.values()))
def test_flash_equals_dense(case):
    found = errors(case, optimize=False, kernel="flash")
    assert within(found), found


def check_chunk(served, **options):
    """A kernel on a chunk of the keys with rows that see none, through o and lse, against dense."""
    (q, k, v, do, dlse), (q_index, k_index) = draw(), chunk_index()
    mask = Mask(window=13)

    def run(kernel):
        def both(q, k, v):
            return kernel(q, k, v, q_index, k_index, mask, scale=0.3, **options)

        (o, lse), pull = jax.vjp(both, q, k, v)
        return o, lse, pull((do, dlse))

    o, lse, got = jax.jit(lambda: run(served), compiler_options={"xla_backend_optimization_level": 0})()
    empty = ~np.asarray(visible(mask, q_index, k_index)).any(axis=2)
    assert empty.any() and np.isneginf(lse)[empty].all() and (np.asarray(o)[empty] == 0).all()
    assert all(np.isfinite(x).all() for x in got)
    o2, lse2, wanted = run(functools.partial(call, dense))
    np.testing.assert_allclose(o, o2, atol=2e-6)
    np.testing.assert_allclose(lse, lse2, atol=2e-6)
    for one, two in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5 * max(1.0, float(jnp.abs(two).max())))


@pytest.mark.slow
def test_chunk_with_lse_cotangent_and_empty_rows():
    check_chunk(functools.partial(call, flash, blocks=Blocks(8, 16), interpret=True), softcap=3.0)


def check_ring(kernel, size, strategy="ring"):
    """A zigzag ring over a kernel, or nested rings, against dense."""
    layout = "balanced" if strategy == "nested" else "zigzag"
    case = {
        "size": size, "strategy": strategy, "layout": layout, "mask": "causal", "scheme": "alibi", "kernel": kernel,
        "grouping": "gqa", "segments": "packed", "softcap": None, "sink": True,
    }  # fmt: skip
    found = context_cases.errors(case, optimize=False)
    assert within(found), found


@pytest.mark.parametrize("strategy", mostly_slow(["ring", "nested"], ["ring"]))
def test_ring_of_flash_equals_dense(strategy):
    check_ring("flash", 4, strategy)


def check_split(kernel):
    """What the compiler can't do to a Pallas call by itself: two devices share the rows, two the heads and their slopes."""
    case = {**ALIBI, "segments": "packed", "positions": "reset"}
    where, inputs, cotangent = cases.index("packed", "reset"), cases.inputs_of(case), cases.tensors()[3]
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])):
        o, gradients = jax.device_get(cases.program(case, kernel, optimize=False)(inputs, where, cotangent))
    reference, expected = cases.program(case, "dense")(inputs, where, cotangent)
    found = cases.distances(o, reference, gradients, expected)
    assert within(found), found


def test_rows_and_heads_are_split_over_a_mesh():
    check_split("flash")
