"""A model with its positional schemes: the static part that keys a compiled program, and the buffers that enter it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from lcx.attention.parallel.documents import Windows
from lcx.attention.parallel.head_groups import Share
from lcx.attention.parallel.sequence_layout import choose_layout
from lcx.attention.spec import AttentionSpec
from lcx.core.batch import SequenceLayout
from lcx.core.configs import choice
from lcx.core.errors import UserError
from lcx.core.mask import Mask
from lcx.model.config import ModelConfig, is_local
from lcx.model.execution import ExecutionConfig
from lcx.positions.registry import from_config
from lcx.positions.scheme import Scheme, SchemeSpec


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model, how it is computed, and the static part of its positional schemes: all that a compiled program depends on.

    `shifted_group`: tokens in a group of `transformer.shifted_attention`, None for whole rows.
    """

    config: ModelConfig
    execution: ExecutionConfig
    schemes: tuple[tuple[str, SchemeSpec], ...]
    shifted_group: int | None = None

    def scheme(self, kind: str) -> SchemeSpec:
        """The static positional scheme of a layer kind."""
        return dict(self.schemes)[kind]

    def attention(self, kind: str) -> AttentionSpec:
        """How layers of a kind attend."""
        config = self.config
        mask = Mask(causal=True, window=config.window if is_local(kind) else None, prefix=config.prefix_attention)
        scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
        return AttentionSpec(
            mask=mask,
            scheme=self.scheme(kind),
            scale=scale,
            softcap=config.attention_softcap,
            kernel=self.execution.attention,
            strategy=self.execution.context_strategy,
            head_groups=self.execution.head_groups,
        )


def build_schemes(config: ModelConfig, positions: Mapping[str, Any]) -> dict[str, Scheme]:
    """The scheme of each layer kind from a mapping of kind to scheme, spec string or field mapping.

    The key `default` serves kinds that are not named. Raises `UserError` for a name that is not a kind of this model and for a
    kind without a scheme.
    """
    for kind in positions:
        if kind != "default":
            choice("positions", kind, config.kinds)
    schemes = {}
    for kind in config.kinds:
        chosen = positions.get(kind, positions.get("default"))
        if chosen is None:
            raise UserError(f"positions has no scheme for {kind!r} layers; set positions.{kind} or positions.default")
        schemes[kind] = from_config(chosen, f"positions.{kind}")
    return schemes


def build_architecture(
    config: ModelConfig, execution: ExecutionConfig, schemes: Mapping[str, Scheme], length: int, shifted_group: int | None = None
) -> tuple[Architecture, dict[str, Any]]:
    """Static architecture and the arrays of its schemes for a declared length (in tokens, including generated ones).

    The arrays are a pytree `{kind: {"rotations": ..., ...}}` whose structure does not depend on theta, so programs compiled for one
    theta work for all. Raises `UserError` for kinds of layers whose schemes would add different vectors to the embeddings.
    """
    specs = tuple((kind, schemes[kind].spec(length)) for kind in config.kinds)
    added = {kind: dataclasses.replace(schemes[kind], temperature=None) for kind, spec in specs if spec.embed is not None}
    for kind, scheme in added.items():
        if scheme != next(iter(added.values())):
            raise UserError(
                f"positions.{next(iter(added))} and positions.{kind} would each add vectors of their own to the embeddings, which "
                "all kinds of layers share; set both to the same scheme, or one to nope"
            )
    buffers = {kind: schemes[kind].buffers(config.heads, length) for kind in config.kinds}
    return Architecture(config, execution, specs, shifted_group), buffers


def windows(config: ModelConfig) -> Windows:
    """The windows of a model's kinds of layers, and the fraction of its layers of each."""
    found = [config.window if is_local(kind) else None for kind in config.layer_kinds]
    return tuple((window, found.count(window) / len(found)) for window in dict.fromkeys(found))


def share_of(model: ModelConfig, length: int, mesh: Mapping[str, int], rows: int = 1) -> Share:
    """What a device has of rows of `length` tokens over a mesh (axis to size), before heads are traded for tokens."""
    tensor, ring = mesh["tensor"], mesh["ring"]
    heads, kv_heads = model.num_heads // tensor, max(1, model.num_kv_heads // tensor)
    return Share(rows, length // ring, heads, kv_heads, model.head_dim, mesh["ulysses"], ring)


def row_layout(config: ModelConfig, execution: ExecutionConfig, length: int, mesh: Mesh) -> SequenceLayout:
    """How rows of `length` tokens are distributed over the devices of a mesh if nothing is known of their documents."""
    return choose_layout(execution.context_layout, length, mesh.shape["ring"], all(is_local(kind) for kind in config.kinds))
