"""Attention over a split sequence: equal to one device, whatever the strategy, layout and number of devices; or refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.attention.attend import attend
from lcx.attention.parallel.context import choose_strategy
from lcx.attention.parallel.head_groups import HeadGroups, Share, choose_groups
from lcx.attention.parallel.sequence_layout import SEQUENCE_LAYOUTS, arrange, check_length, choose_layout, restore
from lcx.attention.parallel.ulysses import check_heads
from lcx.attention.plan import choose_kernel
from lcx.attention.tiles import visited_pairs
from lcx.core.batch import Index
from lcx.core.chips import CHIPS
from lcx.core.errors import UserError
from lcx.core.mask import Mask
from lcx.core.mesh import MeshConfig, make_mesh
from tests.attention.cases import index, within
from tests.attention.context_cases import OPTIONS, T, allowed, context_parallel_attention, errors, inputs_of, program
from tests.attention.test_plan import spec
from tests.covering import each_setting, pairs_of, pairwise
from tests.quick import mostly_slow

ROWS = pairwise(OPTIONS, allowed)


def cost(row):
    """About in proportion to what there is to compile: pieces, and hops of a window to both sides or of nested rings."""
    twice = (row["strategy"] == "window" and row["layout"] == "zigzag") or row["layout"] == "balanced"
    return (1 + 2 * (row["scheme"] == "self_extend")) * (1 + 2 * twice)


DENSE = [row for row in ROWS if row["kernel"] == "dense"]
QUICK = [*each_setting([row for row in ROWS if row not in DENSE], cost), min(DENSE, key=cost)]
"""Every option with the kernel of long rows, and the other kernel once; `make test-all` has every pair of options."""
CASE = {
    "size": 4, "strategy": "ring", "layout": "zigzag", "mask": "causal", "scheme": "rope", "kernel": "blockwise", "grouping": "gqa",
    "segments": "packed", "softcap": None, "sink": True, "groups": 1,
}  # fmt: skip


def test_covering_array_holds_every_pair_that_can_exist():
    seen = set().union(*(pairs_of(row) for row in ROWS))
    assert all(allowed(row) for row in ROWS)
    assert {("strategy", "window"), ("layout", "zigzag")} in seen
    assert {("strategy", "hybrid"), ("size", 6)} in seen and {("strategy", "hybrid"), ("layout", "balanced")} in seen
    assert len(ROWS) <= 44
    assert {setting for row in QUICK for setting in row.items()} == {(name, x) for name, values in OPTIONS.items() for x in values}


@pytest.mark.parametrize("case", mostly_slow(ROWS, QUICK), ids=lambda case: "-".join(str(value) for value in case.values()))
def test_split_attention_equals_dense(case):
    found = errors(case, optimize=False)
    assert within(found), found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "gather", "window", "hybrid"])
def test_heads_in_groups_equal_dense(strategy):
    """The whole exchange for some heads, then for the next ones."""
    mask = "window" if strategy == "window" else "causal"
    found = errors({**CASE, "strategy": strategy, "mask": mask, "groups": "most"}, optimize=False)
    assert within(found), found


@pytest.mark.parametrize("grouping", mostly_slow(["mha", "gqa", "mqa"], ["gqa"]))
def test_queries_in_groups_over_keys_exchanged_once_equal_dense(grouping):
    found = errors({**CASE, "strategy": "ulysses", "layout": "contiguous", "grouping": grouping, "groups": "most"}, optimize=False)
    assert within(found), found


def test_heads_that_are_sent_twice_keep_their_bias():
    """Six KV heads over four devices: each gets three, two of them also its neighbour's."""
    case = {**CASE, "strategy": "ulysses", "layout": "contiguous", "scheme": "alibi"}
    found = errors(case, optimize=False)
    assert within(found), found


SHARE = Share(rows=2, tokens=24, heads=24, kv_heads=6, head_dim=4, ulysses=2, ring=2)


def test_heads_are_grouped_by_size_and_as_far_as_they_divide():
    assert SHARE.possible() == [(1, 1), (3, 1)]  # two KV heads a group, one for each device
    assert dataclasses.replace(SHARE, ring=1).possible() == [(1, 1), (3, 1), (3, 2), (3, 4)]
    assert dataclasses.replace(SHARE, ring=1, ulysses=4).possible() == [(1, 1), (1, 2)]  # KV heads are sent to two devices
    assert SHARE.of_group(HeadGroups(3, 1)) == (4, 1)
    assert choose_groups(SHARE, "tpu", "ring", False, None) == (1, 1)
    long = dataclasses.replace(SHARE, tokens=2**20, head_dim=128, ulysses=1)
    assert choose_groups(long, "tpu", "ring", False, None) == (6, 1)
    assert choose_groups(long, "gpu", "gather", False, None) == (6, 1)
    assert choose_groups(dataclasses.replace(long, tokens=2**16), "tpu", "ring", False, None) == (3, 1)
    assert choose_groups(long, "tpu", "ring", True, None) == (1, 1)
    assert choose_groups(long, "cpu", "ring", False, None) == (6, 1)
    assert choose_groups(long, "cpu", "gather", False, None) == (1, 1)


@pytest.mark.parametrize(
    ("biased", "words"), [(False, "24 heads and 6 KV heads; use one of [1, 3], or None"), (True, "a positional bias is computed")]
)
def test_groups_that_do_not_fit_are_refused(biased, words):
    with pytest.raises(UserError) as caught:
        choose_groups(SHARE, "tpu", "ring", biased, 4)
    assert "execution.head_groups=4" in str(caught.value) and words in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [("ring", 8, 1), ("ulysses", 8, 8)], ids=lambda s: s[0])
def test_heads_in_groups_take_less_memory(strategy):
    length, (_, context, ulysses) = 2048, strategy
    where = arrange(Index.dense(1, length), "zigzag", context // ulysses).replace(layout="zigzag")
    q, k = (jax.ShapeDtypeStruct((1, length, heads, 16), jnp.float32) for heads in (64, 8))

    def temporary(groups):
        layer = spec(kernel="blockwise", strategy="ring", head_groups=groups)

        def loss(q, k, v):
            return jnp.sum(attend(layer, q, k, v, where, where, q_tables={}, k_tables={}) ** 2)

        with jax.set_mesh(make_mesh(MeshConfig(fsdp=1, context=context, ulysses=ulysses), jax.devices()[:8])):
            program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(8) < 0.7 * temporary(1)


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_ring():
    results = []
    for size in (2, 3, 4, 6, 8):
        case = {**CASE, "size": size}
        results.append(context_parallel_attention(case, *inputs_of(case), optimize=False))
    for other in results[1:]:
        for got, wanted in zip(jax.tree.leaves(other), jax.tree.leaves(results[0]), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * max(1.0, np.abs(wanted).max()))


@pytest.mark.slow
def test_bfloat16_is_no_worse_on_a_larger_ring():
    """Every partial result is merged in float32: the error against float64 at 8 devices is at most 1.2 times that at 2."""
    case = {**CASE, "sink": False}
    inputs, cotangent = inputs_of(case, jnp.bfloat16)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64), (inputs, cotangent))
        exact = jax.device_get(program(case, "auto", "dense")(wide[0], index("packed", "reset", T), wide[1]))
    worst = {}
    for size in (2, 8):
        found = context_parallel_attention({**case, "size": size}, inputs, cotangent, optimize=False)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
        worst[size] = [float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64) - y)))) for x, y in pairs]
    assert all(eight <= 1.2 * two for two, eight in zip(worst[2], worst[8], strict=True)), worst


@pytest.mark.parametrize("layout", [layout for layout in SEQUENCE_LAYOUTS if layout != "balanced"])
@pytest.mark.parametrize("ring_size", [1, 2, 3, 8])
def test_layouts_are_permutations_and_restored(layout, ring_size):
    x = np.arange(2 * 48 * 3).reshape(2, 48, 3)
    dealt = arrange(x, layout, ring_size)
    assert isinstance(dealt, np.ndarray)
    assert sorted(dealt[0, :, 0]) == sorted(x[0, :, 0])
    np.testing.assert_array_equal(restore(dealt, layout, ring_size), x)
    np.testing.assert_array_equal(np.asarray(arrange(jnp.asarray(x), layout, ring_size)), dealt)


def test_layouts_deal_as_they_say():
    row = np.arange(16)[None]
    assert arrange(row, "zigzag", 4)[0].reshape(4, 4).tolist() == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    assert arrange(row, "striped", 4)[0].reshape(4, 4).tolist() == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]


@pytest.mark.parametrize("ring", mostly_slow([2, 8], [2]))
def test_zigzag_shares_the_work_evenly(ring):
    """Per device within 5% of equal, and at most .54 of the work of full attention in all."""
    length = 16384
    where = arrange(Index.dense(1, length), "zigzag", ring)
    chunk = length // (2 * ring)
    blocks = choose_kernel(spec(kernel="blockwise"), length // ring, length // ring, "cpu", chunk=min(chunk, 512)).blocks
    shard = length // ring
    work, total = [], 0
    for device in range(ring):
        mine = where.slice(device * shard, shard)
        pairs = [visited_pairs(Mask(), mine, where.slice(other * shard, shard), blocks.q, blocks.k) for other in range(ring)]
        work.append(sum(int(found.visited) for found in pairs))
        total += sum(found.total for found in pairs)
    assert max(work) <= 1.05 * sum(work) / ring and min(work) >= 0.95 * sum(work) / ring
    assert sum(work) <= 0.54 * total


def test_layout_follows_the_layers_and_the_length():
    assert choose_layout("auto", 64, 4, windowed=False) == "zigzag"
    assert choose_layout("auto", 64, 4, windowed=True) == "contiguous"
    assert choose_layout("auto", 64, 1, windowed=False) == "contiguous"
    assert choose_layout("auto", 60, 4, windowed=False) == "striped"
    assert choose_layout("contiguous", 64, 4, windowed=False) == "contiguous"


def chosen(mask, layout, tokens, ring=8, kv_heads=8, chip="v5p"):
    """What `auto` takes with so many tokens on each device, for 32 heads."""
    return choose_strategy("auto", mask, layout, Share(1, tokens, 32, kv_heads, 128, 1, ring), CHIPS[chip])


def test_strategy_follows_the_cost_on_the_chip_and_says_why():
    few = chosen(Mask(), "zigzag", 256)
    assert few.strategy == "gather" and few.reason.startswith("gather: by arithmetic a ring takes ")
    many = chosen(Mask(), "zigzag", 8192)
    assert many.strategy == "ring" and many.schedule.before == 7
    host = chosen(Mask(), "zigzag", 256, chip="cpu")
    assert host.strategy == "ring" and "between devices of one host there is nothing to hide" in host.reason
    near = chosen(Mask(window=1024), "contiguous", 8192)
    assert near.strategy == "window" and (near.schedule.before, near.schedule.after) == (1, 0)
    sides = chosen(Mask(window=1024), "zigzag", 8192)
    assert sides.strategy == "window" and (sides.schedule.before, sides.schedule.after) == (1, 1)
    striped = [chosen(Mask(window=1024), "striped", 8192, chip=chip).strategy for chip in ("cpu", "v5p")]
    assert striped == ["ring", "gather"]  # all keys are needed, for little work
    assert chosen(Mask(window=1024), "contiguous", 16, ring=128).strategy == "gather"  # 64 hops for what all links bring at once


@pytest.mark.parametrize(
    ("mask", "layout"), [(Mask(), "contiguous"), (Mask(window=3), "striped"), (Mask(window=3, prefix=True), "contiguous")]
)
def test_a_window_that_is_none_is_refused(mask, layout):
    with pytest.raises(UserError, match="strategy 'window' needs a window that ends within the ring"):
        choose_strategy("window", mask, layout, Share(1, 12, 1, 1, 8, 1, 4), CHIPS["v5p"])


def test_lengths_and_heads_that_do_not_divide_name_those_that_do():
    message = r"seq_len=4098 must be divisible by 2·ring=16 \(zigzag chunks\); try 4096 or 4112"
    with pytest.raises(UserError, match=message):
        check_length("seq_len", 4098, "zigzag", 8)
    with pytest.raises(UserError, match="try 4096 or 4104"):
        check_length("seq_len", 4098, "striped", 8)
    with pytest.raises(UserError, match=r"mesh.ulysses=8 must divide the 12 heads of a device; use one of \[1, 2, 3, 4, 6, 12\]"):
        check_heads(12, 8)


def test_rows_that_cannot_be_split_are_refused_before_anything_runs():
    config = MeshConfig(fsdp=1, context=4)
    q = jnp.zeros((1, 6, 4, 4))
    where = Index.dense(1, 6)
    with (
        jax.set_mesh(make_mesh(config, jax.devices()[:4])),
        pytest.raises(UserError, match="6 queries and 6 keys must be divisible by the 4"),
    ):
        attend(spec(), q, q, q, where, where, q_tables={}, k_tables={})


def test_strategy_is_an_option_of_the_layer():
    assert dataclasses.replace(spec(), strategy="gather").strategy == "gather"
    with pytest.raises(UserError, match="context strategy='rings' is unknown; did you mean 'ring'"):
        spec(strategy="rings")
