"""Kernels held in 8 or 4 bits, as the frozen base of adapters may be (QLoRA, Dettmers et al., 2305.14314).

qwix quantises them: a block of weights of one output shares a float32 scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lcx.core.extras import library

KINDS = ("int8", "nf4")
"""What a kernel may be held as."""

BLOCK = 64
"""The most weights that share a scale, as in the paper."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The values of NormalFloat4 (appendix E of the paper)."""

Hold = Callable[[str, jax.Array], Any]
"""A parameter, named by its path, as it is to be held."""


@flax.struct.dataclass
class Quantized:
    """A kernel in few bits, one leaf to `core.trees` and two arrays to JAX.

    `values` int8, or uint8 with two weights of four bits a byte where `axis` has an even number of them, in all `size`. `scale`
    float32, one for a block of weights along `axis`, which counts from the end, so that layers can be cut off at the front.
    """

    values: Any
    scale: Any
    kind: str = flax.struct.field(pytree_node=False)
    axis: int = flax.struct.field(pytree_node=False)
    size: int = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's."""
        shape = list(self.values.shape)
        shape[self.axis] = self.size
        return tuple(shape)


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of a parameter tree is held in fewer bits than its numbers have."""
    return isinstance(leaf, Quantized)


def block_of(size: int) -> int:
    """Weights that share a scale along an axis of `size`: its largest divisor up to `BLOCK`."""
    return next(n for n in range(min(size, BLOCK), 0, -1) if size % n == 0)


def quantize(kernel: jax.Array, kind: str, axis: int) -> Quantized:
    """`kernel` with its weights in the bits of `kind`, in blocks along `axis`, the last one that its product sums over."""
    others, size = [i for i in range(kernel.ndim) if i != axis], kernel.shape[axis]
    qwix = library("qwix", f"a base in {kind}", "qlora")
    found = qwix.quantize(kernel.astype(jnp.float32), kind, channelwise_axes=others, tiled_axes={axis: block_of(size)})
    values = found.qvalue
    if kind == "nf4":
        values = values.astype(jnp.uint8)
        if pairs(size):
            # JAX's own arrays of four bits cannot be given to a program that was compiled ahead.
            low, high = (jax.lax.slice_in_dim(values, first, None, 2, axis) for first in (0, 1))
            values = low | high << 4
    return Quantized(values, found.scale, kind, axis - kernel.ndim, size)


def dense(kernel: Any, dtype: Any) -> jax.Array:
    """A kernel in `dtype`, whatever it is held as.

    The same numbers as `qwix.dequantize`, which flattens a kernel and so gathers it where a mesh splits it.
    """
    if not is_quantized(kernel):
        return kernel.astype(dtype)
    values, shape, axis = kernel.values, kernel.shape, kernel.axis % kernel.values.ndim
    if kernel.kind == "nf4":
        if pairs(kernel.size):
            values = jnp.stack([values & 15, values >> 4], axis + 1).reshape(shape)
        values = jnp.asarray(NF4, jnp.float32)[values]
    count = kernel.scale.shape[axis]
    blocks = values.reshape(*shape[:axis], count, shape[axis] // count, *shape[axis + 1 :]).astype(jnp.float32)
    return (blocks * jnp.expand_dims(kernel.scale, axis + 1)).reshape(shape).astype(dtype)


def pairs(size: int) -> bool:
    """Whether weights of four bits are held two to a byte along an axis of `size`."""
    return size % 2 == 0


def bytes_of(kind: str, size: int) -> float:
    """Bytes of a weight whose product sums over an axis of `size`, with its share of a scale."""
    return (0.5 if kind == "nf4" and pairs(size) else 1) + 4 / block_of(size)
