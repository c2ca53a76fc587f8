"""Chooses a kernel for a layer, and puts rotation, pieces, temperature and sinks around it.

Legend: B batch, T query tokens, S key tokens, N heads, K KV heads, H head dim, R rotary pairs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from lcx.attention.context import Strategy, over_devices, over_mesh, resolve_context
from lcx.attention.local import Kernel, Keys, Local, Queries, forward
from lcx.attention.merge import Partial, apply_sinks
from lcx.attention.split_kv import split_kv
from lcx.attention.tiles import Blocks
from lcx.attention.ulysses import check_heads
from lcx.core.batch import Index
from lcx.core.config import choice
from lcx.core.errors import UserError
from lcx.core.mask import Mask
from lcx.core.mesh import axis_size, context_size, target_platform
from lcx.positions.form import Form
from lcx.positions.rotary import Tables

DENSE_LIMIT = 2**19
"""Logits (B·N·T·S) up to which the dense kernel is taken: its float32 array then is 2 MiB, what a core's cache holds. Beyond,
tiles are faster even on short rows: forward and backward of 8 rows of 256 tokens take about half the time."""

FLASH_SIDE = 1024
"""Queries of a KV head, and keys, in a tile of the flash kernel: its float32 logits take 4 MiB of a TPU's on-chip memory, and
a tile takes longer to compute than a grid step to begin."""

CPU_TILE = 2**19
"""Logits in a tile on a CPU, as far as heads and rows may be grouped to fill it: what keeps its threads busy beyond the start of
each loop turn."""


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Static description of one kind of layer; `block_q` and `block_k` override the chosen tile sizes, `strategy`
    what serves a sequence that is split over the mesh. `interpret` lets the flash kernel run where there is no TPU, for tests."""

    mask: Mask
    form: Form
    scale: float
    softcap: float | None = None
    kernel: Kernel | Literal["auto"] = "auto"
    block_q: int | None = None
    block_k: int | None = None
    strategy: Strategy | Literal["auto"] = "auto"
    interpret: bool = False

    def __post_init__(self) -> None:
        if self.kernel not in ("dense", "flat", "blockwise", "flash", "auto"):
            raise UserError(f"attention kernel {self.kernel!r} is unknown; choose dense, blockwise, flash or auto")
        choice("context strategy", self.strategy, ("auto", *get_args(Strategy)))
        for name in ("block_q", "block_k"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise UserError(f"{name}={size} must be at least 1")


class Plan(NamedTuple):
    """What `resolve` decided: `blocks` is None for the dense and the flat kernel."""

    kernel: Kernel
    blocks: Blocks | None
    reason: str


def resolve(
    spec: AttentionSpec,
    T: int,
    S: int,
    platform: str,
    *,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int = 1,
    chunk: int | None = None,
    devices: int = 1,
    tensor: int = 1,
) -> Plan:
    """Kernel and tile sizes for `T` queries and `S` keys on a platform ("cpu", "gpu", "tpu"), and a sentence that says why.

    Where only `chunk` tokens at a time follow one another (a zigzag layout), no tile lies across the seam: it would span the row.
    `devices` that work side by side share a CPU's caches, and get smaller tiles. `tensor` of them share the heads.
    """
    logits = batch * heads * T * S
    kernel, why = spec.kernel, "asked for"
    if kernel == "auto" and T == 1 and platform == "cpu" and tensor == 1:
        return Plan("flat", None, "flat: one query a row reads all keys as they lie")
    if kernel == "auto":
        small = logits <= DENSE_LIMIT
        kernel = "dense" if small else "flash" if platform == "tpu" else "blockwise"
        why = f"{logits:,} logits are {'at most' if small else 'more than'} {DENSE_LIMIT:,}"
    if kernel in ("dense", "flat"):
        return Plan(kernel, None, f"{kernel}: {why}")
    if kernel == "flash" and not (platform == "tpu" or spec.interpret):
        raise UserError(f"attention kernel 'flash' is for TPUs, and this is a {platform}; choose blockwise, dense or auto")
    if kernel == "flash" and not (spec.form.bias is None or spec.form.bias.linear):
        kernel, why = "blockwise", f"{why}; flash adds no bias but ALiBi's, and this is {type(spec.form.bias).__name__}"
    if kernel == "flash":
        blocks = _flash_blocks(spec, chunk or T, chunk or S, heads // kv_heads)
    else:
        blocks = _blocks(spec, chunk or T, chunk or S, platform, batch, heads, kv_heads, devices)
    if chunk is not None:
        blocks = dataclasses.replace(blocks, q=_part(chunk, blocks.q), k=_part(chunk, blocks.k))
    return Plan(kernel, blocks, f"{kernel}: {why}; tiles of {blocks.q} queries by {blocks.k} keys suit {platform}")


def attend(
    spec: AttentionSpec,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_index: Index,
    k_index: Index,
    *,
    q_tables: Tables,
    k_tables: Tables,
    bias_params: Any = None,
    temperature: jax.Array | None = None,
    sinks: jax.Array | None = None,
    cached: bool = False,
) -> jax.Array:
    """One layer's attention from raw (not rotated) queries and keys to `o_BTNH` in q's dtype.

    `q_tables` and `k_tables` come from `positions.rotary.tables`. `temperature` is float32 `[B, T]` and multiplies q;
    `sinks` `[N]` enter the denominator once, after the pieces are merged. All arrays but the indices are differentiable.

    `cached`: the keys are the slots of a cache, and on a mesh that splits sequences stay where they are (`attention.split_kv`);
    there is no gradient then.
    """
    B, T, N, _ = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q = q_BTNH
    if temperature is not None:
        q = (q.astype(jnp.float32) * temperature[:, :, None, None]).astype(q.dtype)
    queries, keys = Queries(q, q_index, q_tables), Keys(k_BSKH, v_BSKH, k_index, k_tables)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    mesh = jax.sharding.get_abstract_mesh()
    if context_size() > 1:
        o, lse = (_over_slots if cached else _over_mesh)(spec, mesh, queries, keys, bias_params)
    else:
        local = _local(spec, B, T, S, N, K, q.dtype)
        run = functools.partial(forward, out_dtype=wide if len(spec.form.pieces) > 1 or sinks is not None else q.dtype)
        if local.kernel == "flash" and mesh.size > 1:
            # The compiler can't split a Pallas call by itself.
            split = functools.partial(over_devices, mesh, local.kernel, lambda shared, *args: run(shared(local), *args))
            o, lse = split(queries, keys, bias_params)
        else:
            o, lse = run(local, queries, keys, bias_params)
    if sinks is not None:
        o, _ = apply_sinks(o, lse, sinks)
    return o.astype(q_BTNH.dtype)


def _local(
    spec: AttentionSpec, B: int, T: int, S: int, N: int, K: int, dtype: Any, chunk: int | None = None, devices: int = 1
) -> Local:
    """The kernel for what a device works on; `chunk`: tokens that follow one another in its rows."""
    mesh = jax.sharding.get_abstract_mesh()
    tensor = 1 if mesh.empty else axis_size(mesh, "heads")
    plan = resolve(spec, T, S, target_platform(), batch=B, heads=N, kv_heads=K, chunk=chunk, devices=devices, tensor=tensor)
    return Local(spec.mask, spec.form, spec.scale, spec.softcap, plan.blocks, _tile_dtype(dtype), plan.kernel, spec.interpret)


def _over_mesh(spec: AttentionSpec, mesh: AbstractMesh, queries: Queries, keys: Keys, bias_params: Any) -> Partial:
    B, T, N, _ = queries.q.shape
    S, K = keys.k.shape[1:3]
    pieces, layout = mesh.shape["ring"], keys.index.layout
    if T % axis_size(mesh, "sequence") or S != T:
        raise UserError(f"{T} queries and {S} keys can't be split over {axis_size(mesh, 'sequence')} devices of mesh.context")
    check_heads(N, mesh.shape["ulysses"])
    plan = resolve_context(spec.strategy, spec.mask, layout, T, pieces, N // K)
    chunk = T // (2 * pieces) if layout == "zigzag" else None

    def local(tokens: int, heads: int, kv_heads: int) -> Local:
        return _local(spec, B, tokens, tokens, heads, kv_heads, queries.q.dtype, chunk, mesh.size)

    return over_mesh(mesh, plan, local, queries, keys, bias_params)


def _over_slots(spec: AttentionSpec, mesh: AbstractMesh, queries: Queries, keys: Keys, bias_params: Any) -> Partial:
    B, T, N, _ = queries.q.shape
    S, K = keys.k.shape[1:3]
    size = axis_size(mesh, "sequence")
    local, spread = _local(spec, B, T, S // size, N, K, queries.q.dtype, None, mesh.size), T % size == 0
    return over_devices(
        mesh, local.kernel, lambda shared, *args: split_kv(shared(local), spread, *args), queries, keys, bias_params, spread
    )


def _tile_dtype(dtype: Any) -> Any:
    """CPUs multiply float32 tiles fastest; accelerators the dtype that they are given."""
    return jnp.promote_types(dtype, jnp.float32) if target_platform() == "cpu" else dtype


def _blocks(spec: AttentionSpec, T: int, S: int, platform: str, batch: int, heads: int, kv_heads: int, devices: int) -> Blocks:
    """Tile sizes. On a CPU a tile's logits stay near its caches; an accelerator takes all rows and heads at once."""
    group = heads // kv_heads
    if platform == "cpu":
        # Eight devices are many enough: smaller tiles than these cost more than they save.
        longest, budget = max(T, S), CPU_TILE // min(devices, 8)
        side = 128 if longest <= 256 else 256 if longest <= 1024 else 512
    else:
        side, budget = 512, 2**62
    if spec.mask.window is not None:
        # Of a window of w keys, blocks of side b visit about w + 2b: small blocks pay where the window is small.
        side = min(side, max(64, _power(spec.mask.window)))
    block_k = spec.block_k or min(side, _round_up(S, 16))
    # A row of 512 in one tile of queries: products large enough for two threads, which gain more than the masked half costs.
    wide = 512 if platform == "cpu" and side == 256 and max(T, S) <= 512 else side
    block_q = spec.block_q or min(max(wide // group, 64), _round_up(T, 16))
    if spec.form.bias is not None:
        share = kv_heads
    else:
        share = _divisor(kv_heads, budget // (group * block_q * block_k))
    rows = _divisor(batch, budget // (share * group * block_q * block_k))
    return Blocks(block_q, block_k, rows, share)


def _flash_blocks(spec: AttentionSpec, T: int, S: int, group: int) -> Blocks:
    side = FLASH_SIDE if spec.mask.window is None else min(FLASH_SIDE, max(128, _power(spec.mask.window)))
    block_q = spec.block_q or min(max(side // group // 16 * 16, 16), _round_up(T, 16))
    return Blocks(block_q, spec.block_k or min(side, _round_up(S, 16)))


def _part(x: int, most: int) -> int:
    """The largest divisor of x that is at most `most`, unless that is less than half of it: then `most`."""
    part = _divisor(x, most)
    return part if 2 * part >= min(x, most) else most


def _power(x: int) -> int:
    """The least power of two that is at least x."""
    return 1 << max(0, math.ceil(math.log2(x)))


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _divisor(x: int, most: int) -> int:
    """The largest divisor of x that is at most `most`, at least 1."""
    return max(d for d in range(1, x + 1) if x % d == 0 and d <= max(1, most))
