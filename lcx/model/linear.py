"""The only place where weight matrices are applied, forward and backward in the forms that compilers handle fastest."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lcx.core.mesh import target_platform
from lcx.core.trees import Tree


def linear(params: Tree, x: jax.Array, contract: int = 1) -> jax.Array:
    """`x` times `params["kernel"]` over the last `contract` axes of x, plus the bias if there is one.

    The only place where a weight matrix is applied. Kernels are `[*ins, *outs]`, biases `[*outs]`.
    """
    kernel = params["kernel"]
    y = _matmul(contract, x, kernel)
    if (bias := params.get("bias")) is not None:
        y = y + bias.reshape((1,) * (x.ndim - contract) + bias.shape)
    return y


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
def _matmul(contract: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x` times `kernel` over the last `contract` axes of x, forward and backward as plain matrix products.

    XLA's CPU backend is several times slower on products with several free axes. And JAX's own transpose asks for the kernel's
    gradient transposed: XLA then writes x or dy transposed, with strides, and recomputes what produced it, so that a feed-forward
    layer takes twice as long.
    """
    size, outs = x.shape[: x.ndim - contract], kernel.shape[contract:]
    return (_flat(x, contract) @ _matrix(kernel, contract)).reshape(*size, *outs)


def _matmul_forward(contract: int, x: jax.Array, kernel: jax.Array) -> tuple:
    return _matmul(contract, x, kernel), (x, kernel)


def _matmul_backward(contract: int, saved: tuple, dy: jax.Array) -> tuple:
    x, kernel = saved
    flat_x, flat_dy = _flat(x, contract), _flat(dy, kernel.ndim - contract)
    rows = tuple(range(flat_x.ndim - 1))
    dx = jax.lax.dot_general(flat_dy, _matrix(kernel, contract), (((len(rows),), (1,)), ((), ())))
    return dx.reshape(x.shape), _outer(flat_x, flat_dy).reshape(kernel.shape)


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


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _flat(x: jax.Array, count: int) -> jax.Array:
    """The last `count` axes as one."""
    return x.reshape(*x.shape[: x.ndim - count], -1)


def _matrix(kernel: jax.Array, contract: int) -> jax.Array:
    return kernel.reshape(math.prod(kernel.shape[:contract]), -1)
