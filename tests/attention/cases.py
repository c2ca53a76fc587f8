"""Blockwise against dense over the product of options: what a case is, and how far apart the two are.

Legend: B batch, T tokens, N heads, K KV heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx.attention.attend import attend
from lcx.attention.spec import AttentionSpec, KernelSpec
from lcx.core.batch import SHARED, Index
from lcx.core.mask import Mask
from lcx.positions.bias import Alibi, AlibiBias, T5Bias
from lcx.positions.piecewise import DualChunk, SelfExtend
from lcx.positions.rotary import Rope, tables
from lcx.positions.scheme import Heads, SchemeSpec

B, T, N, H = 2, 44, 4, 8
BLOCK_Q, BLOCK_K = 16, 24
HEADS = Heads(N, N, H, N * H)

OPTIONS = {
    "mask": ("causal", "window", "prefix", "full"),
    "bias": ("none", "alibi", "t5"),
    "pieces": ("one", "self_extend", "dual_chunk"),
    "grouping": ("mha", "gqa", "mqa"),
    "segments": ("none", "packed", "shared", "padding"),
    "positions": ("continuous", "reset"),
    "softcap": (None, 5.0),
    "sink": (False, True),
}
DATA = ("segments", "positions")
"""Options that are data to a compiled program, not structure."""

MASKS = {"causal": Mask(), "window": Mask(window=9), "prefix": Mask(prefix=True), "full": Mask(causal=False)}
SCHEMES = {
    "one": Rope(theta=100.0),
    "self_extend": SelfExtend(theta=100.0, window=10, group=3),
    "dual_chunk": DualChunk(theta=100.0, original_length=16, chunk=12),
}
KV_HEADS = {"mha": 4, "gqa": 2, "mqa": 1}


def product() -> list[dict[str, Any]]:
    """All rows of the product; those that share a compiled program follow one another."""
    names = [*(name for name in OPTIONS if name not in DATA), *DATA]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(OPTIONS[name] for name in names))]


def index(segments: str, positions: str, length: int = T) -> Index:
    """Two rows whose documents end in different places; the first 5 tokens of each document are its prefix."""
    order = np.broadcast_to(np.arange(length, dtype=np.int32), (B, length))
    ends = np.asarray([[0, 19, 33], [0, 7, 38]])
    document = np.stack([np.searchsorted(row, order[0], side="right") for row in ends]).astype(np.int32)
    start = np.take_along_axis(ends, document - 1, axis=1)
    ids = np.ones_like(document) if segments == "none" else document
    if segments == "shared":
        ids = np.where(order == 0, SHARED, ids)
    if segments == "padding":
        ids = np.where(order >= np.asarray([[40], [27]]), 0, ids)
    if segments == "half":
        ids = np.where(order >= length // 2, 0, ids)
    seen = order if positions == "continuous" else order - start
    return Index(*(jnp.asarray(x, jnp.int32) for x in (order, seen, ids, order - start < 5)))


def scheme_of(pieces: str, bias: str) -> SchemeSpec:
    """The rotary pieces with a bias on top."""
    biases = {"none": None, "alibi": AlibiBias(), "t5": T5Bias(8, 20, True)}
    return dataclasses.replace(SCHEMES[pieces].spec(T), bias=biases[bias])


def bias_params(bias: str) -> Any:
    """Parameters of the bias, drawn where they are learned."""
    if bias == "none":
        return {}
    if bias == "alibi":
        return jax.tree.map(jnp.asarray, Alibi().buffers(HEADS, T)["bias"])
    return {"table": jax.random.normal(jax.random.key(7), (8, N))}


@functools.lru_cache(maxsize=1)
def tensors() -> tuple[jax.Array, ...]:
    """q, k, v and the cotangent of o; k and v have as many heads as q and are cut to the KV heads of a case."""
    return tuple(jax.random.normal(key, (B, T, N, H)) for key in jax.random.split(jax.random.key(0), 4))


def call(
    kernel: Any, q: Any, k: Any, v: Any, q_index: Index, k_index: Index, mask: Mask, *, bias_params: Any = None, **options: Any
) -> Any:
    """A kernel with a `KernelSpec` of these options."""
    return kernel(KernelSpec(mask, **options), q, k, v, q_index, k_index, bias_params)


def served(kernel: str) -> dict[str, Any]:
    """Options of `AttentionSpec` for a kernel by its name in tests: "flash" is the TPU's, "flash gpu" the GPU's, interpreted."""
    name, _, platform = kernel.partition(" ")
    return {"kernel": name, "interpret": (platform or "tpu") if name == "flash" else None}


def program(case: dict[str, Any], kernel: str, optimize: bool = True) -> Any:
    """(inputs, data) → (o, gradients) of one kernel; `inputs` is a dict of all that is differentiated.

    The oracle runs op by op, which is cheaper than one compile a case; so are the others without LLVM's optimisations.
    """
    scheme = scheme_of(case["pieces"], case["bias"])
    spec = AttentionSpec(
        MASKS[case["mask"]], scheme, scale=0.5, softcap=case["softcap"], block_q=BLOCK_Q,
        block_k=BLOCK_Q if kernel == "flash gpu" else BLOCK_K, **served(kernel),
    )  # fmt: skip
    rotations = SCHEMES[case["pieces"]].buffers(HEADS, T)

    def run(inputs: dict[str, Any], where: Index, cotangent: jax.Array) -> Any:
        turned = tables(scheme, rotations, where.positions)

        def output(x: dict[str, Any]) -> jax.Array:
            extra = {"bias_params": x["bias"], "sinks": x.get("sinks")}
            return attend(spec, x["q"], x["k"], x["v"], where, where, q_tables=turned, k_tables=turned, **extra)

        o, pull = jax.vjp(output, inputs)
        return o, pull(cotangent)[0]

    if kernel == "dense":
        return run
    return jax.jit(run, compiler_options={} if optimize else {"xla_backend_optimization_level": 0})


@functools.lru_cache(maxsize=1)
def programs(structure: tuple[tuple[str, Any], ...], kernel: str, optimize: bool) -> tuple[Any, Any]:
    """A kernel and the oracle, of a structure; the last one is kept, so that cases of one structure compile once."""
    case = dict(structure)
    return program(case, kernel, optimize), program(case, "dense")


def inputs_of(case: dict[str, Any]) -> dict[str, Any]:
    """What is differentiated in a case."""
    q, k, v, _ = tensors()
    heads = KV_HEADS[case["grouping"]]
    inputs = {"q": q, "k": k[:, :, :heads], "v": v[:, :, :heads], "bias": bias_params(case["bias"])}
    return {**inputs, "sinks": jnp.linspace(-1.0, 2.0, N)} if case["sink"] else inputs


def errors(case: dict[str, Any], optimize: bool = True, kernel: str = "blockwise") -> dict[str, float]:
    """Largest |kernel − dense| of the output, and of each gradient over max(1, max|reference|); NaN counts as infinite."""
    structure = tuple((name, value) for name, value in case.items() if name not in DATA)
    where, inputs = index(case["segments"], case["positions"]), inputs_of(case)
    (o, gradients), (reference, expected) = (f(inputs, where, tensors()[3]) for f in programs(structure, kernel, optimize))
    return distances(o, reference, gradients, expected)


def distances(o: Any, reference: Any, gradients: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Largest error of the output, and of each gradient over max(1, max|reference|); NaN counts as infinite."""
    found = {"o": jnp.max(jnp.abs(o - reference))}
    for (path, got), wanted in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True):
        error = jnp.max(jnp.abs(got - wanted)) / jnp.maximum(1.0, jnp.max(jnp.abs(wanted)))
        found["d" + jax.tree_util.keystr(path, simple=True, separator=".")] = error
    return {name: float(value) if jnp.isfinite(value) else float("inf") for name, value in found.items()}


def within(found: dict[str, float]) -> bool:
    """Outputs within 2e-6, gradients within 1e-5."""
    return all(value <= (2e-6 if name == "o" else 1e-5) for name, value in found.items())
