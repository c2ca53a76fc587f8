"""Attention over a split sequence against dense on one device: what a case is, and how far apart the two are.

Legend: B batch, T tokens, N heads, K KV heads, H head dim.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx.attention.attend import attend
from lcx.attention.parallel.dealing import deal
from lcx.attention.parallel.documents import Documents
from lcx.attention.parallel.head_groups import Share
from lcx.attention.parallel.sequence_layout import arrange, restore
from lcx.attention.spec import AttentionSpec
from lcx.core.mask import Mask
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.positions.bias import T5, Alibi
from lcx.positions.piecewise import SelfExtend
from lcx.positions.registry import from_config
from lcx.positions.rotary import Rope, tables
from lcx.positions.scheme import Heads
from tests.attention.cases import distances, index, served

B, T, N, H = 2, 48, 24, 4
HEADS = Heads(N, N, H, N * H)

OPTIONS = {
    "size": (2, 3, 4, 6, 8),
    "strategy": ("ring", "gather", "window", "ulysses", "hybrid", "nested"),
    "layout": ("contiguous", "zigzag", "striped", "balanced"),
    "mask": ("causal", "window", "prefix", "full", "full window"),
    "scheme": ("rope", "self_extend", "alibi", "t5", "nope"),
    "kernel": ("blockwise", "dense"),
    "grouping": ("mha", "gqa", "mqa"),
    "segments": ("none", "packed", "shared", "padding", "half"),
    "softcap": (None, 5.0),
    "sink": (False, True),
    "groups": (1, "most"),
}

MASKS = {
    "causal": Mask(),
    "window": Mask(window=3),
    "prefix": Mask(prefix=True),
    "full": Mask(causal=False),
    "full window": Mask(causal=False, window=3),
}
SCHEMES = {
    "rope": Rope(theta=100.0),
    "self_extend": SelfExtend(theta=100.0, window=10, group=3),
    "alibi": Alibi(),
    "t5": T5(buckets=8, max_distance=20, bidirectional=True),
    "nope": from_config("nope"),
}
KV_HEADS = {"mha": 24, "gqa": 6, "mqa": 1}


def allowed(case: dict[str, Any]) -> bool:
    """Whether a case, whole or in part, can exist: the others are refused (`tests/attention/test_context.py`)."""
    size, strategy, layout, mask = (case.get(name) for name in ("size", "strategy", "layout", "mask"))
    if case.get("groups") == "most":
        # A bias is computed for all heads at once, and a ring is walked once for every group of KV heads.
        around = strategy not in (None, "ulysses")
        if case.get("scheme") in ("alibi", "t5") or (case.get("grouping") == "mqa" and around):
            return False
    # Documents of a row are dealt for the one strategy, alone or behind an exchange of heads.
    if layout == "balanced" and strategy not in (None, "nested", "hybrid"):
        return False
    if strategy == "nested":
        return layout in (None, "balanced")
    if strategy == "hybrid":
        return size not in (2, 3)
    if strategy == "ulysses":  # one piece of the ring: nothing to deal
        return layout in (None, "contiguous")
    if strategy == "window":
        # Neighbours on one side, or on both, and someone left whom they are spared.
        both = layout == "zigzag" or mask == "full window"
        return layout != "striped" and mask in (None, "window", "full window") and (size is None or size > (3 if both else 2))
    return True


def mesh_of(case: dict[str, Any]) -> MeshConfig:
    """Ring × ulysses for a size and a strategy."""
    ulysses = {"ulysses": case["size"], "hybrid": 2}.get(case["strategy"], 1)
    return MeshConfig(fsdp=1, context=case["size"], ulysses=ulysses)


def groups_of(case: dict[str, Any]) -> int:
    """The number of groups in which a case's heads attend."""
    if case["groups"] == 1:
        return 1
    mesh = mesh_of(case)
    ring = mesh.context // mesh.ulysses
    return Share(B, T // ring, N, KV_HEADS[case["grouping"]], H, mesh.ulysses, ring).possible()[-1].count


def inputs_of(case: dict[str, Any], dtype: Any = jnp.float32) -> tuple[dict[str, Any], jax.Array]:
    """What is differentiated in a case, and the cotangent of o."""
    q, k, v, cotangent = (jax.random.normal(key, (B, T, N, H)).astype(dtype) for key in jax.random.split(jax.random.key(0), 4))
    heads = KV_HEADS[case["grouping"]]
    bias = {"table": jax.random.normal(jax.random.key(7), (8, N))} if case["scheme"] == "t5" else {}
    inputs = {"q": q, "k": k[:, :, :heads], "v": v[:, :, :heads], "bias": bias}
    return {**inputs, "sinks": jnp.linspace(-1.0, 2.0, N)} if case["sink"] else inputs, cotangent


def program(case: dict[str, Any], strategy: str, kernel: str) -> Any:
    """(inputs, index, cotangent) → (o, gradients); over the mesh that is set, or on one device."""
    scheme = SCHEMES[case["scheme"]]
    scheme, constants = scheme.spec(T), scheme.buffers(HEADS, T)
    block = 16 if kernel == "flash gpu" else 8
    spec = AttentionSpec(
        MASKS[case["mask"]], scheme, scale=0.5, softcap=case["softcap"], block_q=block, block_k=block, strategy=strategy,
        head_groups=groups_of(case) if "groups" in case else None, **served(kernel),
    )  # fmt: skip

    def run(inputs: dict[str, Any], where: Any, cotangent: jax.Array) -> Any:
        rotations = tables(scheme, constants, where.positions)

        def output(x: dict[str, Any]) -> jax.Array:
            bias = {**constants.get("bias", {}), **x["bias"]}
            extra = {"bias_params": bias, "sinks": x.get("sinks")}
            return attend(spec, x["q"], x["k"], x["v"], where, where, q_tables=rotations, k_tables=rotations, **extra)

        o, pull = jax.vjp(output, inputs)
        return o, pull(cotangent)[0]

    return run


def context_parallel_attention(case: dict[str, Any], inputs: dict[str, Any], cotangent: jax.Array, optimize: bool = True) -> Any:
    """(o, gradients) of a case on its mesh, in row order."""
    config = mesh_of(case)
    ring = config.context // config.ulysses
    where = index(case["segments"], "reset", T)
    if case["layout"] == "balanced":
        deal_row, back, changed = by_documents(np.asarray(where.segments), ring)
        where = jax.tree.map(deal_row, where).replace(**changed)
    else:
        deal_row = functools.partial(arrange, layout=case["layout"], ring_size=ring)
        back = functools.partial(restore, layout=case["layout"], ring_size=ring)
        where = deal_row(where)
    where, rows = where.replace(layout=case["layout"]), {name: deal_row(inputs[name]) for name in "qkv"}
    with jax.set_mesh(make_mesh(config, jax.devices()[: case["size"]])):
        run = compiled(tuple((name, value) for name, value in case.items() if name != "segments"), optimize)
        o, gradients = run({**inputs, **rows}, where, deal_row(cotangent))
    o, gradients = jax.device_get((o, gradients))
    return back(o), {**gradients, **{name: back(gradients[name]) for name in "qkv"}}


def by_documents(segments: np.ndarray, ring: int) -> tuple[Callable, Callable, dict[str, jax.Array]]:
    """How rows `[B, T, ...]` of these segments are dealt and put in order again, and the reach and new segments `[B, T]`."""
    pieces = [deal(Documents.of(row), ring) for row in segments]
    numbered = np.stack([own.segments(Documents.of(row)) for own, row in zip(pieces, segments, strict=True)])
    columns = np.stack([row.columns for row in pieces])
    reach = np.stack([np.repeat(row.reach, row.length) for row in pieces])

    def by(columns: np.ndarray, x: Any) -> Any:
        return jnp.take_along_axis(x, columns.reshape(*columns.shape, *(1,) * (x.ndim - 2)), axis=1)

    forward, backward = (functools.partial(by, places) for places in (columns, np.argsort(columns, axis=1)))
    return forward, backward, {"reach": jnp.asarray(reach, jnp.int32), "segments": jnp.asarray(numbered, jnp.int32)}


@functools.lru_cache(maxsize=1)
def compiled(structure: tuple[tuple[str, Any], ...], optimize: bool) -> Any:
    """The program of a structure; the last one is kept, so that cases that differ in their segments compile once."""
    case = dict(structure)
    around = "nested" if case["layout"] == "balanced" else "ring"
    strategy = {"ulysses": "auto", "hybrid": around}.get(case["strategy"], case["strategy"])
    options = {"xla_cpu_parallel_codegen_split_count": 1}
    if not optimize:
        options |= {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    return jax.jit(program(case, strategy, case["kernel"]), compiler_options=options)


@functools.cache
def oracle(case: tuple[tuple[str, Any], ...]) -> Any:
    """(o, gradients) of dense on one device, for what of a case that depends on."""
    inputs, cotangent = inputs_of(dict(case))
    return jax.device_get(program(dict(case), "auto", "dense")(inputs, index(dict(case)["segments"], "reset", T), cotangent))


def errors(case: dict[str, Any], optimize: bool = True) -> dict[str, float]:
    """Largest |split − dense| of the output, and of each gradient over max(1, max|reference|); NaN counts as infinite."""
    inputs, cotangent = inputs_of(case)
    o, gradients = context_parallel_attention(case, inputs, cotangent, optimize)
    names = ("mask", "scheme", "grouping", "segments", "softcap", "sink")
    reference, expected = oracle(tuple((name, case[name]) for name in names))
    return distances(o, reference, gradients, expected)


def product() -> list[dict[str, Any]]:
    """Every strategy, layout, mask and scheme at every size, over each kind of rows: plain, softcap with GQA, sinks with MQA.

    Cases that share a compiled program follow one another. The covering array has the dense kernel, and further pairs of options;
    windows over keys on both sides are plain here.
    """
    plain = {"kernel": "blockwise", "grouping": "mha", "softcap": None, "sink": False, "groups": 1}
    further: tuple[dict[str, Any], ...] = ({}, {"softcap": 5.0, "grouping": "gqa"}, {"sink": True, "grouping": "mqa"})
    grouped = {"groups": "most", "grouping": "gqa"}
    names = ("size", "strategy", "layout", "mask", "scheme")
    found = []
    for values in itertools.product(*(OPTIONS[name] for name in names)):
        case = dict(zip(names, values, strict=True))
        if allowed(case):
            options = further[:1] if case["mask"] == "full window" else further
            if case["mask"] in ("causal", "window") and allowed({**case, **grouped}):
                options = (*options, grouped)
            found += [{**case, **plain, **more, "segments": rows} for more in options for rows in ("packed", "padding", "half")]
    return found
