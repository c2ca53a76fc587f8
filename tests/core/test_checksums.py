"""Checksums of arrays: one element is seen, another mesh is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lcx.core.checksums import compare, own_sums

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "bool")


def tree(dtype="float32"):
    rng = np.random.default_rng(0)
    return {"a": {"w": rng.integers(0, 2, (16, 8, 3)).astype(jnp.dtype(dtype))}, "b": jnp.ones((), dtype)}


def placed(x, mesh, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element_of_any_type_is_seen(dtype):
    before = tree(dtype)
    sums = own_sums(before)
    assert compare(before, sums).unlike == compare(before, sums).open == []
    assert sums["a/w"].boxes.keys() == {"0:16,0:8,0:3"} and sums["b"].boxes.keys() == {""}
    changed = before["a"]["w"].copy()
    changed[5, 3, 1] = 1 - changed[5, 3, 1]
    assert compare({"a": {"w": changed}, "b": before["b"]}, sums).unlike == ["a/w"]


def test_any_mesh_compares_with_any_other(devices):
    x = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)
    two = jax.sharding.Mesh(np.array(devices[:8]).reshape(4, 2), ("x", "y"))
    ways = [x, jnp.asarray(x), placed(x, two, "x", "y"), placed(x, two, "y"), placed(x, two, None, ("x", "y")), placed(x, two)]
    assert len(own_sums({"x": ways[2]})["x"].boxes) == 8 and len(own_sums({"x": ways[5]})["x"].boxes) == 1
    bad = x.copy()
    bad[15, 7] += 1
    for one in ways:
        sums = own_sums({"x": one})
        for other in ways:
            assert compare({"x": other}, sums).unlike == []
            put = jax.device_put(bad, other.sharding) if isinstance(other, jax.Array) else bad
            assert compare({"x": put}, sums).unlike == ["x"]


def test_another_shape_type_or_name_is_unlike():
    sums = own_sums({"x": np.zeros((4, 2), np.float32)})
    for other in (np.zeros((2, 4), np.float32), np.zeros((4, 2), np.int32)):
        assert compare({"x": other}, sums).unlike == ["x"]
    assert compare({"y": np.zeros((4, 2), np.float32)}, sums).unlike == ["y"]
