"""The root-mean-square norm."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lcx.core.trees import Tree
from lcx.model.config import ModelConfig

Norm = Callable[[jax.Array], jax.Array]


def before(params: Tree | None, config: ModelConfig) -> Norm | None:
    """The norm before a branch, from its parameters; None without one."""
    return None if params is None else functools.partial(rms_norm, params, config=config)


def rms_norm(params: Tree, x: jax.Array, config: ModelConfig) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32, returned in x's dtype (Zhang & Sennrich, 1910.07467)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.norm_eps)
    scale = params["scale"].astype(jnp.float32) + config.norm_offset
    return (wide * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)
