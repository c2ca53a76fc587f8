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
from lcx.core.quantized import dense
from lcx.core.trees import Tree


def linear(params: Tree, x: jax.Array, inputs: int = 1) -> jax.Array:
    """`x` times `params["kernel"]` over the last `inputs` axes of x (`ParamSpec.inputs`), plus the bias if there is one.

    Kernels are `[*ins, *outs]`, biases `[*outs]`. With `params["lora"]` the kernel is changed by a product of two thin matrices
    (Hu et al., 2106.09685): `a` `[*ins, r]`, `b` `[r, *outs]`, `scale` a scalar; with its `magnitude` `[*outs]` by DoRA
    (Liu et al., 2402.09353), whose norms carry no gradient. A kernel may be quantised.
    """
    kernel, lora = dense(params["kernel"], x.dtype), params.get("lora")
    y: Any = _matmul(inputs, x, kernel)
    if lora is not None:
        y = y + lora["scale"].astype(x.dtype) * _matmul(1, _matmul(inputs, x, lora["a"]), lora["b"])
        if "magnitude" in lora:
            y = y * _for_each_row(lora["magnitude"] / jax.lax.stop_gradient(norms(kernel + change(lora), inputs)), y)
    if (bias := params.get("bias")) is not None:
        y = y + _for_each_row(bias, y)
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
    return (_flat(x, inputs) @ _matrix(kernel, inputs)).reshape(*size, *outs)


def _matmul_forward(inputs: int, x: Any, kernel: Any) -> tuple:
    # A kernel that is not trained needs no gradient, and so x need not be kept.
    saved = (x.value if kernel.perturbed else None, kernel.value)
    return _matmul(inputs, x.value, kernel.value), saved


def _matmul_backward(inputs: int, saved: tuple, dy: jax.Array) -> tuple:
    x, kernel = saved
    flat_dy = _flat(dy, kernel.ndim - inputs)
    dx = jax.lax.dot_general(flat_dy, _matrix(kernel, inputs), (((flat_dy.ndim - 1,), (1,)), ((), ())))
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
    turned = jax.lax.optimization_barrier(jnp.moveaxis(x, -1, 0))
    return jax.lax.dot_general(turned, dy, ((tuple(r + 1 for r in rows), rows), ((), ())))


_matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)


def _flat(x: jax.Array, count: int) -> jax.Array:
    """The last `count` axes as one."""
    return x.reshape(*x.shape[: x.ndim - count], -1)


def _matrix(kernel: jax.Array, inputs: int) -> jax.Array:
    return kernel.reshape(math.prod(kernel.shape[:inputs]), -1)


def head_logits(kernel: jax.Array, hidden: jax.Array) -> jax.Array:
    """`[..., D]` times the output weights `[D, C]`, or a tile of them, in float32: `[..., C]`."""
    return jnp.einsum("...d,dc->...c", hidden, kernel, preferred_element_type=jnp.float32)


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
