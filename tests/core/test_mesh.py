"""Mesh sizes, the rules from logical to physical axes, and parameter trees."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lcx.core import host
from lcx.core.errors import UserError
from lcx.core.mesh import AXES, MeshConfig, check_divides, fast_dtype, make_mesh, num_slices, partition_spec, slices_spanned
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


def test_one_device_is_one():
    for config, says in (
        (MeshConfig(tensor=2), "need a multiple of 2 devices and 1 is available; lower their product, or take 2 devices"),
        (MeshConfig(fsdp=2), "need 2 devices and 1 is available; set one axis to -1 to use it"),
    ):
        with pytest.raises(UserError, match=says):
            config.sizes(1)
    with pytest.raises(UserError, match="need 1 device and 8 are available; set one axis to -1 to use them all"):
        MeshConfig(fsdp=1).sizes(8)


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
def test_the_type_to_compute_in(platform, capability, dtype, monkeypatch):
    assert fast_dtype(platform, capability) == dtype
    monkeypatch.setattr(host, "multiplies_bfloat16", lambda: True)
    assert (fast_dtype(), fast_dtype(one_by_one=True)) == ("bfloat16", "float32")  # the tests run on CPUs


class Chip:
    """As much of a TPU's chip as a mesh asks for."""

    platform, device_kind, process_index, core_on_chip = "tpu", "a chip of four to a slice", 0, 0

    def __init__(self, number, slice_index):
        self.id, self.slice_index, self.coords = number, slice_index, [number % 2, number // 2 % 2, 0]


def test_slices():
    chips = [Chip(i, i // 4) for i in (5, 4, 7, 6, 1, 0, 3, 2)]
    assert num_slices(chips) == 2 and num_slices(jax.devices()) == 1
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, context=2, tensor=2), chips)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "expert": 1, "tensor": 2, "ring": 2, "ulysses": 1}
    for part in mesh.devices[:, 0, 0]:
        assert len({chip.slice_index for chip in part.flat}) == 1  # whatever is below data stays within a slice
    mesh = make_mesh(MeshConfig(fsdp=8), chips)
    assert [chip.slice_index for chip in mesh.devices.flat] == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("sizes", "slices", "with_context", "found"),
    [
        ({"data": 4}, 2, False, {"data": 2}),
        ({"data": 2, "fsdp": 8}, 4, False, {"data": 2, "fsdp": 2}),
        ({"data": 3, "fsdp": 8}, 4, False, {"fsdp": 4}),
        ({"ring": 8}, 4, True, {"ring": 4}),
        ({"data": 2, "ring": 8}, 4, True, {"data": 2, "ring": 2}),
    ],
)
def test_axes_slices_spanned(sizes, slices, with_context, found):
    every = dict.fromkeys(AXES, 1)
    assert slices_spanned({**every, **sizes}, slices, with_context) == {**every, **found}


def test_the_sequence_does_not_cross_slices_unasked():
    chips = [Chip(i, i // 4) for i in range(8)]
    with pytest.raises(UserError, match="2 TPU slices cannot share mesh.data=1 x mesh.fsdp=1.*mesh.context_over_slices=True"):
        make_mesh(MeshConfig(context=8, fsdp=1), chips)
    mesh = make_mesh(MeshConfig(context=8, fsdp=1, context_over_slices=True), chips)
    assert [chip.slice_index for chip in mesh.devices.flat] == [0] * 4 + [1] * 4
    with pytest.raises(UserError, match="make their product a multiple of 2, each slice taking whole parts$"):
        make_mesh(MeshConfig(tensor=8, fsdp=1, context_over_slices=True), chips)
