"""Which kernel is chosen and why; rotation, query scaling and dtype around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.attention.attend import attend
from lcx.attention.dense import dense
from lcx.attention.plan import choose_kernel, shard_spec
from lcx.attention.spec import AttentionSpec, Blocks
from lcx.core import host
from lcx.core.batch import Index
from lcx.core.errors import UserError
from lcx.core.mask import Mask
from lcx.positions.bias import AlibiBias, T5Bias
from lcx.positions.rotary import Rope, rotate, tables
from lcx.positions.scheme import Heads, SchemeSpec
from tests.attention.cases import call

PLAIN = SchemeSpec()


def spec(**options):
    return AttentionSpec(options.pop("mask", Mask()), options.pop("scheme", PLAIN), scale=0.5, **options)


def test_choice_depends_on_size_and_says_so():
    small = choose_kernel(spec(), 64, 64, "cpu", batch=2, heads=4, kv_heads=2)
    assert small.kernel == "dense" and small.blocks is None and "32,768 logits" in small.reason
    large = choose_kernel(spec(), 16384, 16384, "cpu", heads=8, kv_heads=8)
    assert large.kernel == "blockwise" and "2,147,483,648 logits" in large.reason and "suit cpu" in large.reason
    assert choose_kernel(spec(kernel="dense"), 16384, 16384, "cpu").reason == "dense: requested"
    assert choose_kernel(spec(kernel="blockwise"), 64, 64, "cpu").kernel == "blockwise"


@pytest.mark.parametrize(
    ("cores", "devices", "long", "short"),
    [
        (2, 1, Blocks(512, 512, 1, 2), Blocks(64, 64, 16, 8)),
        (1, 1, Blocks(256, 256, 1, 1), Blocks(64, 64, 16, 1)),
        (2, 2, Blocks(256, 256, 1, 1), Blocks(64, 64, 16, 1)),
        (8, 2, Blocks(256, 256, 1, 4), Blocks(64, 64, 8, 8)),
    ],
)
def test_a_device_of_one_core_takes_a_head_at_a_time(cores, devices, long, short, monkeypatch):
    monkeypatch.setattr(host, "cores", lambda: cores)
    sizes = {"heads": 8, "kv_heads": 8, "devices": devices}
    assert choose_kernel(spec(), 4096, 4096, "cpu", batch=4, **sizes).blocks == long
    assert choose_kernel(spec(kernel="blockwise"), 64, 64, "cpu", batch=32, **sizes).blocks == short


def test_single_queries_read_a_cache_as_it_lies_on_a_cpu():
    assert choose_kernel(spec(), 1, 4096, "cpu", heads=8, kv_heads=2).kernel == "flat"
    assert choose_kernel(spec(), 1, 4096, "cpu", heads=8, kv_heads=2, tensor=2).kernel == "dense"
    assert choose_kernel(spec(), 2, 4096, "cpu", heads=8, kv_heads=2).kernel == "dense"
    assert choose_kernel(spec(), 1, 4096, "gpu", heads=8, kv_heads=2).kernel == "dense"


def test_flash_serves_tpus_and_no_bias_but_alibi():
    sizes = {"heads": 32, "kv_heads": 8}
    plain = choose_kernel(spec(), 16384, 16384, "tpu", **sizes)
    assert plain.kernel == "flash" and (plain.blocks.q, plain.blocks.k) == (256, 1024) and "suit tpu" in plain.reason
    assert choose_kernel(spec(scheme=SchemeSpec(bias=AlibiBias())), 16384, 16384, "tpu", **sizes).kernel == "flash"
    learned = choose_kernel(spec(scheme=SchemeSpec(bias=T5Bias(8, 20, True)), kernel="flash"), 16384, 16384, "tpu", **sizes)
    assert learned.kernel == "blockwise" and "flash supports no bias except ALiBi's, and this is T5Bias" in learned.reason
    assert choose_kernel(spec(), 64, 64, "tpu").kernel == "dense"
    assert choose_kernel(spec(kernel="flash", interpret="tpu"), 64, 64, "cpu").kernel == "flash"
    with pytest.raises(UserError, match="'flash' runs on TPUs and GPUs, not on a cpu; choose blockwise, dense or auto"):
        choose_kernel(spec(kernel="flash"), 64, 64, "cpu")


def test_flash_serves_gpus_in_tiles_that_are_powers_of_two():
    sizes = {"heads": 32, "kv_heads": 8}
    plain = choose_kernel(spec(), 16384, 16384, "gpu", **sizes)
    assert plain.kernel == "flash" and (plain.blocks.q, plain.blocks.k) == (64, 64) and "suit gpu" in plain.reason
    assert choose_kernel(spec(), 16384, 16384, "gpu", capability="12.0", **sizes) == plain
    wide = choose_kernel(spec(scheme=SchemeSpec(bias=AlibiBias())), 16384, 16384, "gpu", head_dim=256, **sizes)
    assert wide.kernel == "flash" and (wide.blocks.q, wide.blocks.k) == (32, 32)
    dealt = choose_kernel(spec(), 96 * 64, 96 * 64, "gpu", chunk=96, **sizes)
    assert (dealt.blocks.q, dealt.blocks.k) == (32, 32)
    assert choose_kernel(spec(kernel="flash"), 20, 7, "gpu").blocks == Blocks(32, 16)
    assert choose_kernel(spec(), 64, 64, "gpu").kernel == "dense"
    assert choose_kernel(spec(kernel="flash", interpret="gpu"), 64, 64, "cpu").kernel == "flash"
    with pytest.raises(UserError, match="block_q=48 must be a power of two of at least 16 .* on a gpu; try 32 or 64"):
        choose_kernel(spec(kernel="flash", block_q=48), 64, 64, "gpu")


@pytest.mark.parametrize(
    ("options", "T", "why"),
    [
        ({"dtype": jnp.float32}, 16384, "flash would use no tensor cores for float32 on a gpu"),
        ({"head_dim": 320}, 16384, "flash supports heads of at most 256 in bfloat16 on a gpu, and these have 320"),
        ({"capability": "7.5"}, 16384, "flash needs an NVIDIA gpu of compute capability 8.0 or higher, and this is 7.5"),
        ({"capability": "gfx942"}, 16384, "flash needs an NVIDIA gpu of compute capability 8.0 or higher, and this is gfx942"),
        ({}, 1, "flash would use one query of a whole tile on a gpu"),
    ],
)
def test_gpus_take_blockwise_where_flash_does_not_serve_or_pay(options, T, why):
    plan = choose_kernel(spec(), T, 2**20, "gpu", heads=32, kv_heads=8, **options)
    assert plan.kernel == "blockwise" and why in plan.reason
    asked = choose_kernel(spec(kernel="flash"), T, 2**20, "gpu", heads=32, kv_heads=8, **options)
    assert asked.kernel == ("blockwise" if {"head_dim", "capability"} & set(options) else "flash")


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("scheme", [PLAIN, SchemeSpec(bias=AlibiBias())])
@pytest.mark.parametrize("window", [None, 64])
def test_blocks_divide_whatever_the_sizes(platform, scheme, window):
    for batch, heads, kv_heads, tokens in [(1, 8, 8, 16384), (6, 12, 4, 1000), (3, 4, 1, 33)]:
        plan = choose_kernel(
            spec(kernel="blockwise", scheme=scheme, mask=Mask(window=window)),
            tokens, tokens, platform, batch=batch, heads=heads, kv_heads=kv_heads,
        )  # fmt: skip
        assert batch % plan.blocks.rows == 0 and kv_heads % plan.blocks.heads == 0
        assert scheme.bias is None or plan.blocks.heads == kv_heads
    chosen = choose_kernel(spec(kernel="blockwise", block_q=48, block_k=80), 4096, 4096, platform).blocks
    assert (chosen.q, chosen.k) == (48, 80)


def test_wrong_options_are_named():
    with pytest.raises(UserError, match="kernel='flush' is unknown; did you mean 'flash'"):
        choose_kernel(spec(kernel="flush"), 64, 64, "cpu")
    with pytest.raises(UserError, match="block_q=0 must be at least 1"):
        spec(block_q=0)


@pytest.mark.parametrize("units,dtype", [(False, "float32"), (True, "bfloat16")])
def test_tiles_are_multiplied_in_the_type_that_is_fast(units, dtype, monkeypatch):
    monkeypatch.setattr(host, "multiplies_bfloat16", lambda: units)
    q = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)
    assert shard_spec(spec(kernel="blockwise"), q, q.dtype, 8, 8, 2, 2).kernel.tile_dtype == dtype


@pytest.mark.parametrize("kernel", ["dense", "blockwise"])
def test_rotates_once_and_scales_queries(kernel):
    B, T, N, H = 2, 20, 2, 8
    q, k, v = (jax.random.normal(key, (B, T, N, H)) for key in jax.random.split(jax.random.key(0), 3))
    scheme, index = Rope(theta=50.0), Index.dense(B, T)
    turned = tables(scheme.spec(T), scheme.buffers(Heads(N, N, H, N * H), T), index.positions)
    query_scale = 1.0 + 0.1 * index.order.astype(jnp.float32)
    chosen = spec(scheme=scheme.spec(T), kernel=kernel)
    o = attend(chosen, q, k, v, index, index, q_tables=turned, k_tables=turned, query_scale=query_scale)
    turned_q = rotate(q, *turned["rotary"]) * query_scale[:, :, None, None]
    expected, _ = call(dense, turned_q, rotate(k, *turned["rotary"]), v, index, index, Mask(), scale=0.5)
    np.testing.assert_allclose(o, expected, atol=2e-6)
    half = attend(chosen, *(x.astype(jnp.bfloat16) for x in (q, k, v)), index, index, q_tables=turned, k_tables=turned)
    assert half.dtype == jnp.bfloat16
