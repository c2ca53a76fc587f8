"""Mesh sizes, the rules from logical to physical axes, and parameter trees."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lcx.core.errors import UserError
from lcx.core.mesh import AXES, MeshConfig, check_divides, fast_dtype, make_mesh, partition_spec
from lcx.core.param_spec import ONES, Init, ParamSpec, abstract, initialize, shardings
from lcx.core.trees import num_bytes
from tests.compare import worst_error


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), {"fsdp": 8}),
        (MeshConfig(data=2, fsdp=2, tensor=2), {"data": 2, "fsdp": 2, "tensor": 2}),
        (MeshConfig(data=-1, fsdp=1, context=4, ulysses=2), {"data": 2, "ring": 2, "ulysses": 2}),
    ],
)
def test_sizes_are_inferred(devices, config, sizes):
    mesh = make_mesh(config, devices)
    assert dict(mesh.shape) == {**dict.fromkeys(AXES, 1), **sizes}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MeshConfig(data=3), ["data=3", "8"]),
        (MeshConfig(data=-1), ["mesh.data", "mesh.fsdp", "-1"]),
        (MeshConfig(data=2, fsdp=2), ["need 4 devices", "8 are available", "-1"]),
        (MeshConfig(tensor=0), ["mesh.tensor=0"]),
        (MeshConfig(context=4, ulysses=3), ["mesh.ulysses=3", "mesh.context=4"]),
    ],
)
def test_sizes_that_do_not_fit_are_named(devices, config, words):
    with pytest.raises(UserError) as caught:
        make_mesh(config, devices)
    assert all(word in str(caught.value) for word in words), caught.value


def test_partition_spec_and_collisions():
    assert partition_spec(("embed", "heads", None)) == PartitionSpec(("fsdp", "ring", "ulysses"), ("tensor",), None)
    with pytest.raises(ValueError, match="'embed' and 'batch' both claim mesh axis 'fsdp'"):
        partition_spec(("embed", "batch"))


def test_indivisible_sizes_name_the_nearest(devices):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), devices)
    check_divides("batch", 8, mesh, "batch")
    with pytest.raises(
        UserError,
        match=r"rows=6 must be divisible by 4 \(mesh axes fsdp=4\); try 4 or 8, or split it 1, 2, 3 ways instead",
    ):
        check_divides("rows", 6, mesh, "batch")


SPECS = {"a": {"w": ParamSpec((16, 8), ("embed", "mlp"), Init("normal", 0.1))}, "b": ParamSpec((8,), (None,), ONES)}


def test_one_table_gives_tree_shardings_and_values(devices):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), devices)
    tree = abstract(SPECS, mesh)
    values = jax.jit(lambda key: initialize(SPECS, key), out_shardings=shardings(SPECS, mesh))(jax.random.key(0))
    assert jax.tree.map(lambda x: x.sharding, values) == jax.tree.map(lambda x: x.sharding, tree)
    assert values["a"]["w"].addressable_shards[0].data.shape == (4, 4)
    assert num_bytes(tree) == 4 * (16 * 8 + 8)
    np.testing.assert_array_equal(values["b"], 1)
    assert abs(float(np.std(values["a"]["w"])) - 0.1) < 0.02


def test_values_depend_on_path_and_key_alone():
    alone = initialize({"a": SPECS["a"]}, jax.random.key(0))
    both = initialize(SPECS, jax.random.key(0))
    np.testing.assert_array_equal(alone["a"]["w"], both["a"]["w"])
    assert worst_error(initialize(SPECS, jax.random.key(1)), both)[0] > 0.05


@pytest.mark.parametrize("kind", ["normal", "truncated"])
def test_inits_have_the_deviation_asked_for(kind):
    values = initialize({"w": ParamSpec((400, 400), (None, None), Init(kind, 0.3))}, jax.random.key(0))
    assert abs(float(np.std(values["w"])) - 0.3) < 0.005


def test_worst_error_finds_the_leaf_and_counts_nan():
    reference = {"x": np.array([10.0]), "y": np.array([1.0])}
    error, where = worst_error({"x": np.array([10.5]), "y": np.array([1.2])}, reference)
    assert where == "y" and abs(error - 0.2) < 1e-9
    assert worst_error({"x": np.array([np.nan]), "y": np.array([1.0])}, reference) == (float("inf"), "x")
    with pytest.raises(ValueError, match="differ"):
        worst_error({"x": 1.0}, reference)


def test_bad_specs_are_refused():
    with pytest.raises(ValueError, match="logical axes"):
        ParamSpec((2, 3), (None,))


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [
        ("cpu", None, "float32"),
        ("tpu", None, "bfloat16"),
        ("gpu", "9.0", "bfloat16"),
        ("gpu", "7.5", "float32"),
        ("gpu", "gfx942", "bfloat16"),
        ("gpu", None, "bfloat16"),
    ],
)
def test_the_type_to_compute_in(platform, capability, dtype):
    assert fast_dtype(platform, capability) == dtype
    assert fast_dtype() == "float32"  # the tests run on CPUs
