"""The only place where weight matrices are applied, forward and backward in the forms that compilers handle fastest."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp

from lcx.core.mesh import target_platform
from lcx.core.quantized import dense, is_quantized
from lcx.core.trees import Tree

TURNED = "turned"
"""Key of weights that `turned` has made of a kernel."""

FEWEST_ROWS = 4
"""XLA's CPU backend has its fast products of bfloat16 for two rows or more, and they take no longer for four."""


def linear(params: Tree, x: jax.Array, inputs: int = 1) -> jax.Array:
    """`x` times `params["kernel"]` over the last `inputs` axes of x (`ParamSpec.inputs`), plus the bias if there is one.

    Kernels are `[*ins, *outs]`, biases `[*outs]`. With `params["lora"]` the kernel is changed by a product of two thin matrices
    (Hu et al., 2106.09685): `a` `[*ins, r]`, `b` `[r, *outs]`, `scale` a scalar; with its `magnitude` `[*outs]` by DoRA
    (Liu et al., 2402.09353), whose norms carry no gradient. A kernel may be quantised, or the weights be `turned`.
    """
    if (weights := params.get(TURNED)) is not None:
        outs = weights.shape[: weights.ndim - inputs]
        y = _product(_flat(x, inputs), weights.reshape(math.prod(outs), -1), 1).reshape(*x.shape[: x.ndim - inputs], *outs)
    else:
        y = _adapted(params, x, inputs)
    if (bias := params.get("bias")) is not None:
        y = y + _for_each_row(bias, y)
    return y


def _adapted(params: Tree, x: jax.Array, inputs: int) -> jax.Array:
    """`x` times the kernel with its adapter."""
    kernel, lora = dense(params["kernel"], x.dtype), params.get("lora")
    y: Any = _matmul(inputs, x, kernel)
    if lora is not None:
        y = y + lora["scale"].astype(x.dtype) * _matmul(1, _matmul(inputs, x, lora["a"]), lora["b"])
        if "magnitude" in lora:
            y = y * _for_each_row(lora["magnitude"] / jax.lax.stop_gradient(norms(kernel + change(lora), inputs)), y)
    return y


def _for_each_row(outs: jax.Array, y: jax.Array) -> jax.Array:
    """`[*outs]` in the rank of `[..., *outs]`."""
    return outs.reshape((1,) * (y.ndim - outs.ndim) + outs.shape)


def change(lora: Tree) -> jax.Array:
    """What an adapter adds to its kernel: `scale · a · b`, `[*ins, *outs]` or stacked, `[..., *ins, *outs]` for `[...]` scales."""
    a, b, stacked = lora["a"], lora["b"], lora["scale"].ndim
    flat_a = a.reshape(*a.shape[:stacked], -1, a.shape[-1])
    product = flat_a @ b.reshape(*b.shape[: stacked + 1], -1)
    product = lora["scale"][..., None, None].astype(product.dtype) * product
    return product.reshape(*a.shape[:-1], *b.shape[stacked + 1 :])


def effective_kernel(params: Tree, inputs: int) -> jax.Array:
    """The kernel with its adapter folded in; the kernel itself if it has none."""
    kernel, lora = params["kernel"], params.get("lora")
    if lora is None:
        return kernel
    changed = dense(kernel, lora["a"].dtype) + change(lora)
    if "magnitude" not in lora:
        return changed
    stacked = lora["scale"].ndim
    ratio = lora["magnitude"] / jax.lax.stop_gradient(norms(changed, inputs, stacked))
    return changed * ratio.reshape(*ratio.shape[:stacked], *(1,) * inputs, *ratio.shape[stacked:])


def norms(kernel: jax.Array, inputs: int, stacked: int = 0) -> jax.Array:
    """The Euclidean norm of the weights of each output, `[..., *outs]` of a kernel `[..., *ins, *outs]`."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=tuple(range(stacked, stacked + inputs))))


def project(weights: list[Tree], x: jax.Array, norm: Callable[[jax.Array], jax.Array] | None) -> list[jax.Array]:
    """`norm(x)` through each of several linear maps.

    Like `mlp.down`: checkpointed, and yet no matrix product is computed twice, because the backward pass of a product needs
    only its input. The elementwise work before it is recomputed, and its result is not kept.
    """

    @jax.checkpoint
    def run(x: jax.Array) -> list[jax.Array]:
        y = x if norm is None else norm(x)
        return [linear(params, y) for params in weights]

    return run(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(inputs: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x` times `kernel` over the last `inputs` axes of x, forward and backward as plain matrix products.

    XLA's CPU backend is several times slower on products with several free axes. And JAX's own transpose asks for the kernel's
    gradient transposed: XLA then writes x or dy transposed, with strides, and recomputes what produced it, so that a feed-forward
    layer takes twice as long.
    """
    size, outs = x.shape[: x.ndim - inputs], kernel.shape[inputs:]
    return _product(_flat(x, inputs), _matrix(kernel, inputs)).reshape(*size, *outs)


def _product(a: jax.Array, b: jax.Array, b_axis: int = 0, dtype: Any = None) -> jax.Array:
    """`a` times the matrix `b`, over the last axis of a and `b_axis` of b, in `dtype` (None: theirs).

    On a CPU XLA has fast products of bfloat16 only with float32 results, and for more than one row.
    """
    common, dims = jnp.promote_types(a.dtype, b.dtype), (((a.ndim - 1,), (b_axis,)), ((), ()))
    a, b = a.astype(common), b.astype(common)
    if common != jnp.bfloat16 or target_platform() != "cpu":
        return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)
    size, rows = a.shape[:-1], math.prod(a.shape[:-1])
    if rows < FEWEST_ROWS:
        a, dims = jnp.pad(a.reshape(rows, -1), ((0, FEWEST_ROWS - rows), (0, 0))), (((1,), (b_axis,)), ((), ()))
    product = jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32).astype(dtype or common)
    return product if rows >= FEWEST_ROWS else product[:rows].reshape(*size, -1)


def turned(params: Tree, specs: Tree) -> Tree:
    """A layer's parameters with plain kernels `[*ins, *outs]` as `[*outs, *ins]`, in which XLA's CPU backend reads bfloat16 three
    times as fast for few tokens, and for many no slower. For `linear` alone, without a gradient."""
    if "kernel" not in params:
        return {name: turned(value, specs[name]) if isinstance(value, dict) else value for name, value in params.items()}
    kernel, spec = params["kernel"], specs["kernel"]
    if set(params) - {"kernel", "bias"} or is_quantized(kernel) or spec.stacked > 1:
        return params
    moved = jnp.moveaxis(kernel, tuple(range(spec.inputs)), tuple(range(kernel.ndim - spec.inputs, kernel.ndim)))
    return {TURNED: moved, **{name: value for name, value in params.items() if name != "kernel"}}


def _matmul_forward(inputs: int, x: Any, kernel: Any) -> tuple:
    # A kernel that is not trained needs no gradient, and so x need not be kept.
    saved = (x.value if kernel.perturbed else None, kernel.value)
    return _matmul(inputs, x.value, kernel.value), saved


def _matmul_backward(inputs: int, saved: tuple, dy: jax.Array) -> tuple:
    x, kernel = saved
    flat_dy = _flat(dy, kernel.ndim - inputs)
    dx = _product(flat_dy, _matrix(kernel, inputs), 1)
    dx = dx.reshape(*dy.shape[: dy.ndim - kernel.ndim + inputs], *kernel.shape[:inputs])
    return dx, None if x is None else _outer(_flat(x, inputs), flat_dy).reshape(kernel.shape)


def _outer(x: jax.Array, dy: jax.Array) -> jax.Array:
    """`[..., D]` and `[..., F]` to `[D, F]`, summed over the leading axes.

    On a CPU one of the two has to be transposed for a plain product, and a strided copy of a wide array takes longer than the
    product, so the narrow one is transposed, and the barrier keeps what computed it out of the copy.
    """
    rows = tuple(range(x.ndim - 1))
    if target_platform() != "cpu":
        return jax.lax.dot_general(x, dy, ((rows, rows), ((), ())))
    if x.shape[-1] > dy.shape[-1]:
        return _outer(dy, x).T
    columns = jax.lax.optimization_barrier(jnp.moveaxis(x, -1, 0))
    dims, wide = ((tuple(r + 1 for r in rows), rows), ((), ())), jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.dot_general(columns, dy, dims, preferred_element_type=wide).astype(x.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)


def _flat(x: jax.Array, count: int) -> jax.Array:
    """The last `count` axes as one."""
    return x.reshape(*x.shape[: x.ndim - count], -1)


def _matrix(kernel: jax.Array, inputs: int) -> jax.Array:
    return kernel.reshape(math.prod(kernel.shape[:inputs]), -1)


def head_logits(kernel: jax.Array, hidden: jax.Array) -> jax.Array:
    """`[..., D]` times the output weights `[D, C]`, or a tile of them, in float32: `[..., C]`."""
    return _product(hidden, kernel, dtype=jnp.float32)


@jax.custom_vjp
def grouped_linear(rows: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """Rows `[R, ins]` times the kernel `[E, ins, outs]` of their group. Rows after the last group may hold anything."""
    with _precision(rows):
        return jax.lax.ragged_dot(rows, kernels, sizes)


def _precision(x: jax.Array) -> AbstractContextManager:
    """Products of bfloat16 are exact in float32; with a higher precision the kernels for TPUs do not compile."""
    return jax.default_matmul_precision("default") if x.dtype == jnp.bfloat16 else contextlib.nullcontext()


def _grouped_backward(saved: tuple, dy: jax.Array) -> tuple:
    rows, kernels, sizes = saved
    with _precision(rows):
        (d_rows,) = jax.linear_transpose(lambda rows: jax.lax.ragged_dot(rows, kernels, sizes), rows)(dy)
        if target_platform() == "tpu":
            return d_rows, outer_by_group(rows, dy, sizes).astype(kernels.dtype), None
        (d_kernels,) = jax.linear_transpose(lambda kernels: jax.lax.ragged_dot(rows, kernels, sizes), kernels)(dy)
    return d_rows, d_kernels, None


grouped_linear.defvjp(
    lambda rows, kernels, sizes: (grouped_linear(rows, kernels, sizes), (rows, kernels, sizes)), _grouped_backward
)


def outer_by_group(x: jax.Array, dy: jax.Array, sizes: jax.Array, *, interpret: bool = False) -> jax.Array:
    """`[R, ins]` and `[R, outs]` to `[E, ins, outs]`, summed over the rows of each group, by megablox's kernel for TPUs.

    XLA has a kernel for the product with the groups' kernels, but not for this one: it computes all rows for each group.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    R, wide = x.shape[0], 1024 if x.dtype.itemsize == 2 else 512
    tile = min(512, -(-R // 128) * 128)
    x, dy = (jnp.pad(y, ((0, -R % tile), (0, 0))) for y in (x, dy))
    tiling = (tile, min(wide, x.shape[1]), min(wide, dy.shape[1]))
    return tgmm(x.T, dy, sizes, x.dtype, tiling, interpret=interpret)
