"""Topologies by name, and what is said of names that are none."""

import pytest

from lcx.core.chips import CHIPS
from lcx.core.errors import UserError
from lcx.planning.topology import shapes, topology


@pytest.mark.parametrize(
    ("text", "slices", "chips", "devices"),
    [("v5p:4x4x4", 1, 64, 64), ("v5e:16x16", 2, 512, 512), ("tpu7x:2x2x1", 1, 4, 8), ("h100:8", 1, 8, 8), ("cpu:2", 1, 2, 2)],
)
def test_names_give_chips_and_devices(text, slices, chips, devices):
    found = topology(text, slices)
    assert (found.chips, found.devices) == (chips, devices)
    assert str(found).endswith(text) and found.memory * found.chip.cores == found.chip.memory


WRONG = {
    ("v5q:4x4", 1): "--topology='v5q' is unknown; did you mean 'v5",
    ("v5p", 1): "--topology=v5p names no shape; write it as in v5p:4x4x4",
    ("v5p:4x4", 1): "--topology=v5p:4x4 has 2 dimensions, but slices of v5p have 3; write it as in v5p:4x4x4",
    ("v5e:4x0", 1): "--topology=v5e:4x0 names no shape",
    ("v5e:4x4", 0): "--slices=0 must be at least 1",
    ("h100:8", 2): "--slices=2 is for TPUs; name all h100 devices in --topology",
}


@pytest.mark.parametrize(("wrong", "said"), WRONG.items(), ids=str)
def test_what_is_no_topology_is_answered(wrong, said):
    with pytest.raises(UserError) as error:
        topology(*wrong)
    assert said in str(error.value)


def test_slices_grow():
    for name in CHIPS:
        chips = [topology(f"{name}:{'x'.join(map(str, shape))}").chips for shape in shapes(name)]
        assert chips == sorted(set(chips))
