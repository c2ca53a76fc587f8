"""Work in tiles of tokens: the same numbers, and gradients that are summed in float32 whatever the weights are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.model.execution import ExecutionConfig
from lcx.model.tiles import count_tiles, over_tiles, shard_length
from tests.quick import mostly_slow


def scaled(params, x, y):
    return x * params["w"] + y, x


@pytest.mark.parametrize("context", mostly_slow([1, 4], [4]))
def test_tiles_equal_the_whole(context):
    x, y = (jax.random.normal(key, (2, 24, 3)) for key in jax.random.split(jax.random.key(0)))
    params = {"w": jnp.arange(1.0, 4.0)[None, None]}

    def loss(params, x, y, run):
        one, two = run(params, x, y)
        return jnp.sum(jnp.sin(one) * two)

    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1, context=context), jax.devices()[:context])):
        assert shard_length(24) == 24 // context
        tiled = jax.jit(jax.value_and_grad(lambda *a: loss(*a, lambda p, *x: over_tiles(scaled, p, x, 3)), (0, 1, 2)))
        found = tiled(params, x, y)
    want = jax.value_and_grad(lambda *a: loss(*a, scaled), (0, 1, 2))(params, x, y)
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-5)


def test_gradients_of_narrow_weights_are_summed_in_float32():
    """In bfloat16 a sum of ones stops at 256."""
    x = jnp.ones((1, 1024, 1), jnp.bfloat16)

    def total(params):
        return jnp.sum(over_tiles(lambda params, x: x * params["w"], params, (x,), 1024).astype(jnp.float32))

    gradient = jax.jit(jax.grad(total))({"w": jnp.ones((1, 1, 1), jnp.bfloat16)})["w"]
    assert gradient.dtype == jnp.bfloat16 and gradient.item() == 1024


def test_tiles_are_equal_and_at_most_as_long():
    assert [count_tiles(*case) for case in ((12, None), (12, 12), (12, 5), (12, 1), (7, 4))] == [1, 1, 3, 12, 1]
    assert count_tiles(262144, 4096) == 64


def test_periods_that_are_recomputed_together_hold_least():
    nested = ExecutionConfig(remat="nested")
    assert [nested.periods_together(periods) for periods in (1, 2, 28, 32, 80)] == [1, 1, 4, 4, 5]
    assert ExecutionConfig(remat="nested", remat_every=8).periods_together(32) == 8
    assert ExecutionConfig(remat="block").periods_together(32) == 1
    with pytest.raises(UserError, match="execution.remat_every=4 is for execution.remat=nested, and that is block"):
        ExecutionConfig(remat="block", remat_every=4)
    with pytest.raises(UserError, match="head_groups=0 must be"):
        ExecutionConfig(head_groups=0)
