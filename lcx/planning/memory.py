"""What a step holds, by arithmetic: bytes on a device by what they are for, at the moment when they are most.

Parameters, optimizer state and what layers keep are exact. What a layer works on is counted array by array as the compiled step has
it; docs/pods.md compares the sums with a compiler's.

Legend: T tokens, N heads, K key-value heads, H head dim, D model, F feed-forward, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import flax.traverse_util
import jax
import jax.numpy as jnp

from lcx.adapters import lora
from lcx.attention.parallel.head_groups import choose_groups
from lcx.core.mesh import RULES
from lcx.core.numbers import round_up
from lcx.core.param_spec import ParamSpec, abstract, paths_of
from lcx.core.trees import paths
from lcx.model.architecture import share_of
from lcx.planning.program import schemes_at
from lcx.planning.topology import Topology
from lcx.planning.work import Work, work_of
from lcx.training.memory import key_bytes
from lcx.training.optimizer import OptimConfig, is_trained, optimizer
from lcx.training.stages import RunConfig, StageConfig
from lcx.training.step import Table

PARTS = ("parameters", "optimizer", "weights in use", "gradients", "saved inputs", "attention", "feed-forward", "loss")
"""What a device's bytes are for."""


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes on a device by `PARTS` at the fullest moment of a step, and on the host."""

    parts: dict[str, float]
    host: float
    moment: str

    @property
    def total(self) -> float:
        """Of the device."""
        return sum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class StateSizes:
    """Numbers and bytes on a device of what a stage trains and holds, from its table of parameters."""

    parameters: float
    optimizer: float
    trained: float
    layers: float
    trained_layers: float


def held(run: RunConfig, stage: StageConfig, mesh: Mapping[str, int], where: Topology) -> Held:
    """What a step of a stage holds on each device of a mesh (axis to size)."""
    state = state_sizes(run, stage, mesh)
    work = work_of(run.model, run.execution, stage.batch_size, stage.seq_len, stage.accumulate, mesh, where.chip)
    width = jnp.dtype(run.execution.compute_dtype).itemsize
    # Layers' weights are cast before they are gathered; the table of embeddings is gathered whole.
    cast = 0.0 if width == 4 else width * state.layers
    table = width * run.model.vocab_size * run.model.model_dim / mesh["tensor"] if work.weights > 1 else 0.0
    summed = stage.accumulate > 1 or work.chunk is not None
    gradients = width * state.trained_layers + (4 * state.trained if summed else 0.0)
    keys = 0.0 if work.chunk is None else key_bytes(run.model, run.execution, work.rows, stage.seq_len)
    work = laid_out(work, where)
    saved, host = kept(work, width)
    # A CPU's memory is the host's.
    saved, host = (saved + keys, host) if where.chip.platform == "cpu" else (saved, host + keys)
    layer = Layer(work, run, width, where.chip.platform)
    base = {
        "parameters": state.parameters, "optimizer": state.optimizer, "weights in use": cast + table, "gradients": gradients,
        "saved inputs": saved,
    }  # fmt: skip
    moments = {
        "the backward pass of attention": {"attention": layer.attention(), "feed-forward": 0.0, "loss": 0.0},
        "the backward pass of a feed-forward layer": {
            "attention": layer.attended(), "feed-forward": layer.feed_forward(), "loss": 0.0,
        },
        "the loss": {"attention": 0.0, "feed-forward": 0.0, "loss": layer.loss(run.execution.loss_tile)},
        # The update holds gradients in float32, and nothing of the layers.
        "the optimizer's update": {"weights in use": 0.0, "gradients": 8.0 * state.trained, "saved inputs": 0.0},
    }  # fmt: skip
    name = max(moments, key=lambda name: sum({**base, **moments[name]}.values()))
    found = {**dict.fromkeys(PARTS, 0.0), **base, **moments[name]}
    return Held(found, host, name)


def state_sizes(run: RunConfig, stage: StageConfig, mesh: Mapping[str, int]) -> StateSizes:
    """Sizes of the state by the table of parameters and the optimizer's own shapes; nothing is made."""
    table = tuple(paths_of(run.specs(schemes_at(run, run.stages.index(stage)), stage.length)))
    own = {path: _on_device(spec, mesh) for path, spec in table}
    optim = run.optim_of(stage)
    trained = frozenset(path for path in own if is_trained(optim, run.adapters, path))
    parameters = sum(own[path] * lora.held_bytes(path, spec, run.adapters) for path, spec in table)
    state = sum(width * (own[path] if path else size) for path, size, width in _moments(optim, stage.steps, table, trained))
    layers = [path for path in own if path.startswith("layers/")]
    return StateSizes(
        parameters,
        state,
        trained=sum(own[path] for path in trained),
        layers=sum(own[path] for path in layers),
        trained_layers=sum(own[path] for path in layers if path in trained),
    )


@functools.lru_cache(maxsize=32)
def _moments(optim: OptimConfig, steps: int, table: Table, trained: frozenset[str]) -> list[tuple[str, int, int]]:
    """Arrays of an optimizer's state: the parameter that each lies with (empty: none, so that it is whole everywhere), its numbers
    and the bytes of one."""
    specs = flax.traverse_util.unflatten_dict(dict(table), sep="/")
    given = {path: leaf for path, leaf in paths(abstract(specs)) if path in trained}
    found = []
    for path, leaf in paths(jax.eval_shape(optimizer(optim, steps, specs).init, flax.traverse_util.unflatten_dict(given, sep="/"))):
        words = path.split("/")
        ends = ("/".join(words[i:]) for i in range(len(words)))
        place = next((end for end in ends if end in given and given[end].shape == leaf.shape), "")
        found.append((place, math.prod(leaf.shape), leaf.dtype.itemsize))
    return found


def _on_device(spec: ParamSpec, mesh: Mapping[str, int]) -> float:
    """Numbers of a parameter on a device."""
    pieces = (math.prod(mesh[axis] for axis in RULES.get(name or "", ())) for name in spec.logical_axes)
    return math.prod(-(-size // count) for size, count in zip(spec.shape, pieces, strict=True))


def laid_out(work: Work, where: Topology) -> Work:
    """The work with the sizes that arrays have in a device's memory: a TPU fills the last dimension up to a multiple of 128."""
    if where.chip.platform != "tpu":
        return work
    m = work.model
    sizes = {name: round_up(getattr(m, name), 128) for name in ("model_dim", "head_dim", "mlp_dim")}
    return dataclasses.replace(work, model=dataclasses.replace(m, **sizes))


def kept(work: Work, width: int) -> tuple[float, float]:
    """Bytes on the device and on the host of what all layers keep for the backward pass, by the policy."""
    m, t = work.model, work.at_once
    tensor = work.mesh["tensor"]
    periods = max(1, m.num_layers // len(m.pattern))
    inputs = periods * t * m.model_dim * width
    outputs = m.num_layers * t * m.num_heads / tensor * (m.head_dim * width + 4)
    if work.policy.startswith("nested"):
        # The input of each group of periods, and what `attention` keeps within the one that is recomputed.
        groups = periods // work.nested + periods % work.nested
        both = (groups + work.nested) * inputs / periods + work.nested * outputs / periods
        return (2 * inputs / periods, both) if work.policy == "nested_offload" else (both, 0.0)
    if work.policy == "offload":
        return 2 * inputs / periods, inputs + outputs
    if work.policy == "attention":
        return inputs + outputs, 0.0
    if work.policy == "block":
        return inputs, 0.0
    projected = m.head_dim * (m.num_heads + 2 * m.num_kv_heads) / tensor
    inner = m.mlp_dim * (2 if m.gated else 1) / tensor * (1 if m.num_experts is None else m.experts_per_token)
    per_token = projected + 2 * m.model_dim + inner
    whole = m.num_layers * t * width * per_token + inputs
    return (whole, 0.0) if work.policy == "dots" else (whole + outputs + m.num_layers * t * width * 2 * m.model_dim, 0.0)


def head_groups(work: Work, platform: str, asked: int | None) -> int:
    """Groups of heads that attend one after another where devices share a row; 1 elsewhere."""
    if work.share == 1:
        return 1
    share = share_of(work.model, work.length, work.mesh, max(1, int(work.rows)))
    return choose_groups(share, platform, work.strategy, biased=False, asked=asked).count


class Layer:
    """What the backward pass of a layer holds beside what all layers keep, in bytes on a device."""

    def __init__(self, work: Work, run: RunConfig, width: int, platform: str):
        self.work, self.run, self.width, self.platform = work, run, width, platform
        m, tensor = work.model, work.mesh["tensor"]
        self.queries = work.at_once * m.num_heads / tensor * m.head_dim
        self.keys = 2 * work.at_once * m.num_kv_heads / tensor * m.head_dim
        self.stream = work.at_once * m.model_dim

    def attended(self) -> float:
        """Kept of this layer's attention while its feed-forward layer is differentiated: queries, keys, values and outputs."""
        outputs = 0 if self.work.policy == "attention" else self.queries
        return self.width * (self.queries + self.keys + outputs)

    def attention(self) -> float:
        """As attention is differentiated: these, the gradients of all of them, and what a group of heads works on: its queries,
        outputs and their gradients in float32, its keys on their way, and theirs."""
        groups = head_groups(self.work, self.platform, self.run.execution.head_groups)
        shared = self.work.share > 1
        gradients = self.width * (2 * self.queries + self.keys) if shared else 0.0
        wide = 3 * 4 if shared else self.width + 4
        group = (wide * self.queries + (3 * 4 + 2 * self.width if shared else 4) * self.keys) / groups
        return self.attended() + gradients + group + 3 * self.width * self.stream

    def feed_forward(self) -> float:
        """As the feed-forward layer is differentiated, a tile of tokens at a time where it is cut into tiles."""
        m, tile = self.work.model, self.run.execution.mlp_tile
        tiled = self.work.share == 1 or (self.work.recomputes[0] and m.num_experts is None)
        own = self.work.at_once if tile is None or not tiled else min(self.work.at_once, tile)
        inner = own * m.mlp_dim / self.work.mesh["tensor"] * (1 if m.num_experts is None else m.experts_per_token)
        # Gate, up, their product, and the gradients of all three; weights come shard by shard, and none is whole at any time.
        arrays = 6 if m.gated else 3
        return self.width * (arrays * inner + 4 * self.stream)

    def loss(self, tile: int) -> float:
        """A tile of logits with its gradient, the output weights and their gradient, the states and their gradient in float32."""
        m = self.work.model
        logits = min(self.work.at_once * m.vocab_size, tile)
        head = m.model_dim * m.vocab_size / self.work.mesh["tensor"]
        return 8 * logits + 2 * self.width * head + (self.width + 4) * self.stream
