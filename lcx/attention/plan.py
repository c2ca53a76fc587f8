"""Chooses a layer's kernel and tiles, and says why.

Legend: T query tokens, S key tokens, N heads, K KV heads.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from lcx.attention.pallas.gpu_walk import width
from lcx.attention.shard import KERNELS
from lcx.attention.spec import AttentionSpec, Blocks, KernelSpec, Platform, ShardSpec
from lcx.core import host
from lcx.core.configs import choice
from lcx.core.errors import UserError
from lcx.core.mesh import axis_size, compute_capability, target_platform
from lcx.core.numbers import round_up

DENSE_LIMIT = 2**19
"""Logits (B·N·T·S) up to which the dense kernel is used: its float32 array is then 2 MiB, which fits the cache of a core. Beyond
that, tiles are faster even on short rows: forward and backward of 8 rows of 256 tokens take about half the time."""

FLASH_SIDE = 1024
"""Queries of a KV head, and keys, in a tile of the flash kernel: its float32 logits take 4 MiB of a TPU's on-chip memory, and
a tile takes longer to compute than a grid step to start."""

GPU_SIDE = 64
"""Queries of a head, and keys, in a tile of the flash kernel on a GPU for heads of up to `GPU_HEAD` bytes; half as many beyond.
Compiled by Triton 3.9 for compute capabilities 8.0 and 9.0, a program uses at most 97 KiB of shared memory for heads of up to 128
in bfloat16, and spills few registers; tiles of 128 queries spill hundreds of bytes."""

GPU_HEAD = 256
"""Bytes of a head, padded to a power of two: 128 numbers in bfloat16. Flash supports at most twice that on a GPU."""

CPU_TILE = 2**19
"""Logits in a tile on a CPU, over all its devices, as far as heads and rows can be grouped to fill it: enough to keep its threads
busy beyond the overhead of a loop iteration."""

CORE_TILE = 2**16
"""Logits in a tile of a device that has one core: one head's tile stays in the cache of its own, where four heads' take 1.3
times as long, and smaller ones cost more than they save."""


class KernelChoice(NamedTuple):
    """The decision of `choose_kernel`: `blocks` is None for a kernel without tiles."""

    kernel: str
    blocks: Blocks | None
    reason: str


def choose_kernel(
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
    head_dim: int = 128,
    dtype: Any = jnp.bfloat16,
    capability: str | None = None,
) -> KernelChoice:
    """Kernel and tile sizes for `T` queries and `S` keys on a platform ("cpu", "gpu", "tpu"), with a sentence that explains why.

    If only `chunk` tokens at a time are consecutive (a zigzag layout), no tile crosses the seam, as it would span the row.
    `devices` that work at the same time share a CPU's caches, and get smaller tiles. `tensor` of them share the heads.
    `head_dim`, the `dtype` of q and the compute `capability` (None: unknown) matter for a GPU's flash kernel.
    """
    logits = batch * heads * T * S
    kernel, why = choice("attention kernel", spec.kernel, ("auto", *KERNELS)), "requested"
    if kernel == "auto" and T == 1 and platform == "cpu" and tensor == 1:
        return KernelChoice("flat", None, "flat: one query per row reads all keys in their stored layout")
    target, number = spec.interpret or platform, jnp.dtype(dtype)
    unfit = _unfit(spec, target, head_dim, number, capability)
    if kernel == "auto":
        small = logits <= DENSE_LIMIT
        kernel = "dense" if small else "flash" if target in get_args(Platform) else "blockwise"
        why = f"{logits:,} logits are {'at most' if small else 'more than'} {DENSE_LIMIT:,}"
        unfit = unfit or (_slow_on_gpus(T, number) if target == "gpu" else None)
    if not KERNELS[kernel].tiled:
        return KernelChoice(kernel, None, f"{kernel}: {why}")
    if kernel == "flash" and target not in get_args(Platform):
        raise UserError(f"attention kernel 'flash' runs on TPUs and GPUs, not on a {platform}; choose blockwise, dense or auto")
    if kernel == "flash" and unfit:
        kernel, why = "blockwise", f"{why}; {unfit}"
    if kernel == "flash" and target == "gpu":
        blocks = tiles_gpu(spec, chunk or T, chunk or S, head_dim, number)
    elif kernel == "flash":
        blocks = tiles_tpu(spec, chunk or T, chunk or S, heads // kv_heads)
    else:
        blocks = tiles_blockwise(spec, chunk or T, chunk or S, platform, batch, heads, kv_heads, devices)
    if chunk is not None:
        part = _power_part if kernel == "flash" and target == "gpu" else _part
        blocks = dataclasses.replace(blocks, q=part(chunk, blocks.q), k=part(chunk, blocks.k))
    return KernelChoice(kernel, blocks, f"{kernel}: {why}; tiles of {blocks.q} queries by {blocks.k} keys suit {platform}")


def shard_spec(
    spec: AttentionSpec,
    q: jax.Array,
    out_dtype: Any,
    T: int,
    S: int,
    N: int,
    K: int,
    chunk: int | None = None,
    devices: int = 1,
) -> ShardSpec:
    """The kernel for a device's share of the work, for queries with q's rows, head dim and dtype; `chunk`: number of consecutive
    tokens in its rows."""
    mesh, platform = jax.sharding.get_abstract_mesh(), target_platform()
    tensor = 1 if mesh.empty else axis_size(mesh, "heads")
    sizes = {"batch": q.shape[0], "heads": N, "kv_heads": K, "head_dim": q.shape[3]}
    plan = choose_kernel(
        spec, T, S, platform, **sizes, dtype=q.dtype, chunk=chunk, devices=devices, tensor=tensor, capability=compute_capability()
    )
    kernel = KernelSpec(
        spec.mask, spec.scale, spec.softcap, spec.scheme.bias, plan.blocks, _tile_dtype(q.dtype), out_dtype, plan.kernel,
        spec.interpret or platform, spec.interpret is not None,
    )  # fmt: skip
    return ShardSpec(kernel, spec.scheme.regions, spec.scheme.layout)


def _tile_dtype(dtype: Any) -> Any:
    """The given one, unless float32 is faster: on CPUs without units for bfloat16."""
    slow = target_platform() == "cpu" and not host.multiplies_bfloat16()
    return jnp.promote_types(dtype, jnp.float32) if slow else dtype


def tiles_blockwise(
    spec: AttentionSpec, T: int, S: int, platform: str, batch: int, heads: int, kv_heads: int, devices: int
) -> Blocks:
    """Tile sizes. On a CPU a tile's logits stay in its caches; an accelerator processes all rows and heads at once."""
    group = heads // kv_heads
    one_core = platform == "cpu" and devices >= host.cores()
    threads = platform == "cpu" and devices == 1 and not one_core
    if platform == "cpu":
        longest, budget = max(T, S), CORE_TILE if one_core else CPU_TILE // min(devices, 8)
        # If each device has its own part of the work, tiles need not be large enough for the threads of all of them; for eight,
        # larger ones are as fast.
        side = 128 if longest <= 256 else 256 if longest <= 1024 or (not threads and devices < 8) else 512
    else:
        side, budget = 512, 2**62
    if spec.mask.window is not None:
        # For a window of w keys, blocks of side b visit about w + 2b keys: small blocks pay off for small windows.
        side = min(side, max(64, _power(spec.mask.window)))
    block_k = spec.block_k or min(side, round_up(S, 16))
    # A row of 512 in one tile of queries: products are large enough for two threads, which gains more than the masked half costs.
    wide = 512 if threads and side == 256 and max(T, S) <= 512 else side
    if threads and side >= 256:
        # All query heads of a KV head in full: 10 to 30% faster, forward and backward, than as many rows as for a single one.
        query_side = wide
    else:
        query_side = max(wide // group, 64)
    # As many tiles, but of equal size, so that little is filled up.
    block_q = spec.block_q or round_up(-(-T // -(-T // query_side)), 16)
    if spec.scheme.bias is not None:
        share = kv_heads
    elif one_core:
        # On one core, rows of one head are up to twice as fast as some heads of fewer rows.
        share = 1
    else:
        share = _divisor(kv_heads, budget // (group * block_q * block_k))
    rows = _divisor(batch, budget // (share * group * block_q * block_k))
    return Blocks(block_q, block_k, rows, share)


def tiles_tpu(spec: AttentionSpec, T: int, S: int, group: int) -> Blocks:
    """Tiles of `FLASH_SIDE` queries by keys, smaller where the window is; `group` is N / K."""
    side = FLASH_SIDE if spec.mask.window is None else min(FLASH_SIDE, max(128, _power(spec.mask.window)))
    block_q = spec.block_q or min(max(side // group // 16 * 16, 16), round_up(T, 16))
    return Blocks(block_q, spec.block_k or min(side, round_up(S, 16)))


def tiles_gpu(spec: AttentionSpec, T: int, S: int, head_dim: int, dtype: jnp.dtype) -> Blocks:
    """Triton's tiles: sides are powers of two, and at least 16, which a product requires."""
    side = GPU_SIDE if width(head_dim) * dtype.itemsize <= GPU_HEAD else GPU_SIDE // 2
    for name in ("block_q", "block_k"):
        given = getattr(spec, name)
        if given is not None and (given < 16 or given & (given - 1)):
            raise UserError(
                f"{name}={given} must be a power of two of at least 16 for attention kernel 'flash' on a gpu; "
                f"try {max(16, _power(given) // 2)} or {max(32, _power(given))}"
            )
    return Blocks(spec.block_q or min(side, max(16, _power(T))), spec.block_k or min(side, max(16, _power(S))))


def _unfit(spec: AttentionSpec, target: str, head_dim: int, dtype: jnp.dtype, capability: str | None) -> str | None:
    """Why flash does not support a layer, or None if it does."""
    if not (spec.scheme.bias is None or spec.scheme.bias.linear):
        return f"flash supports no bias except ALiBi's, and this is {type(spec.scheme.bias).__name__}"
    most = 2 * GPU_HEAD // dtype.itemsize
    if target == "gpu" and width(head_dim) > most:
        return f"flash supports heads of at most {most} in {dtype.name} on a gpu, and these have {head_dim}"
    # Older ones have no bfloat16 products. AMD's would need other tiles than those that were examined.
    if target == "gpu" and capability is not None and (not capability[0].isdigit() or float(capability) < 8.0):
        return f"flash needs an NVIDIA gpu of compute capability 8.0 or higher, and this is {capability}"
    return None


def _slow_on_gpus(T: int, dtype: jnp.dtype) -> str | None:
    """Why flash would be slower on a GPU than the compiler's own products, or None if it would not."""
    if T == 1:
        return "flash would use one query of a whole tile on a gpu"
    # Exact float32 products use no tensor cores; blockwise multiplies with them unless `jax_default_matmul_precision` forbids.
    return "flash would use no tensor cores for float32 on a gpu" if dtype.itemsize > 2 else None


def _power_part(x: int, most: int) -> int:
    """Like `_part`, for powers of two from 16 on."""
    part = min(x & -x, most)
    return part if part >= 16 and 2 * part >= min(x, most) else most


def _part(x: int, most: int) -> int:
    """The largest divisor of x that is at most `most`, or `most` if that divisor is less than half of it."""
    part = _divisor(x, most)
    return part if 2 * part >= min(x, most) else most


def _power(x: int) -> int:
    """The least power of two that is at least x."""
    return 1 << max(0, math.ceil(math.log2(x)))


def _divisor(x: int, most: int) -> int:
    """The largest divisor of x that is at most `most`, at least 1."""
    return max(d for d in range(1, x + 1) if x % d == 0 and d <= max(1, most))
