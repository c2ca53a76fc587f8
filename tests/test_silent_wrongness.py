"""What long-context training gets wrong without saying so, asked of every way to split a row; and that each question can fail.

Each check is after reports of users of other frameworks: packed documents whose loss is inflated (axolotl 3608) or that see each
other (MaxText 4476), gradients of queries, keys and values that are far off (Transformer Engine 1557, Megatron 1464), a shard that
is wholly masked (Megatron 1764), a flag that does nothing (verl 7476), and a loss that is divided by the wrong group's tokens
(Megatron 673). `MUTATIONS` are deliberate mistakes, each with the check that has to fail on it.

Legend: B batch, T tokens, N heads, K KV heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.attention import attend as attending
from lcx.attention.parallel import context, gather, ring
from lcx.attention.parallel.head_groups import HeadGroups
from lcx.attention.parallel.sequence_layout import arrange
from lcx.attention.shard import shard_attention
from lcx.core.batch import Batch
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.core.param_spec import initialize, paths_of
from lcx.model import loss as losses
from lcx.model import transformer
from lcx.model.architecture import build_architecture, row_layout
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.model.loss import LossSums, loss_sums
from lcx.model.params import specs
from lcx.model.transformer import hidden_states
from lcx.positions.registry import from_config
from lcx.training.optimizer import OptimConfig
from lcx.training.step import TrainStep
from tests.attention import context_cases
from tests.attention.cases import distances, index
from tests.compare import worst_error
from tests.quick import mostly_slow

T, DEVICES = 64, 4
MODEL = ModelConfig(vocab_size=32, model_dim=16, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=4, mlp_dim=16)
WINDOWED = dataclasses.replace(MODEL, pattern=("local",), window=8)
TOLERANCE = 1e-5

STRATEGIES: dict[str, dict[str, Any]] = {
    "ring": {"context_strategy": "ring"},
    "striped ring": {"context_strategy": "ring", "context_layout": "striped"},
    "gather": {"context_strategy": "gather"},
    "balanced": {"context_layout": "balanced"},
    "window": {},
    "ulysses": {"ulysses": 4},
    "hybrid": {"ulysses": 2, "context_strategy": "ring"},
    "groups": {"ulysses": 2, "context_strategy": "ring", "head_groups": 2},
    "tiles": {"context_strategy": "ring", "remat": "block", "mlp_tile": 4, "loss_tile": 64},
    "nested": {
        "ulysses": 2,
        "context_strategy": "ring",
        "head_groups": 2,
        "remat": "nested",
        "remat_every": 2,
        "mlp_tile": 4,
        "loss_tile": 64,
    },
}
QUICK = ("hybrid",)


class Split:
    """A small model whose rows are split over four devices in one of the ways."""

    def __init__(self, strategy: str, **execution: Any):
        settings = {**STRATEGIES.get(strategy, {}), **execution}
        ulysses = settings.pop("ulysses", 1)
        size = settings.pop("context", DEVICES)
        self.mesh = make_mesh(MeshConfig(fsdp=1, context=size, ulysses=ulysses), jax.devices()[:size])
        self.config = WINDOWED if strategy == "window" else MODEL
        scheme = {kind: from_config({"name": "rope", "theta": 100.0}) for kind in self.config.kinds}
        chosen = ExecutionConfig(attention="blockwise", **settings)
        self.arch, self.buffers = build_architecture(self.config, chosen, scheme, T)
        self.params = initialize(specs(self.config, scheme, T), jax.random.key(0))
        self.alone = dataclasses.replace(self.arch, execution=ExecutionConfig(attention="dense"))

    def losses(self, batch: Batch) -> tuple[LossSums, Any]:
        """The sums of a batch over the mesh, and the gradient of Σ w·ℓ."""
        with jax.set_mesh(self.mesh):
            run = jax.jit(lambda params, batch: self._pulled(self.arch, params, batch))
            return jax.device_get(run(self.params, self.dealt(batch)))

    def dealt(self, batch: Batch) -> Batch:
        """The rows in the order in which the devices hold them."""
        layout, ring = row_layout(self.config, self.arch.execution, T, self.mesh), self.mesh.shape["ring"]
        if self.arch.execution.context_layout == "balanced":
            deal_row, _, changed = context_cases.by_documents(np.asarray(batch.segments), ring)
            return jax.tree.map(deal_row, batch).replace(**changed, layout="balanced")
        return jax.tree.map(jnp.asarray, arrange(batch, layout, ring).replace(layout=layout))

    def reference(self, batch: Batch) -> tuple[LossSums, Any]:
        """The same on one device, every score at once."""
        return jax.device_get(jax.jit(lambda params, batch: self._pulled(self.alone, params, batch))(self.params, batch))

    def _pulled(self, arch: Any, params: Any, batch: Batch) -> tuple[LossSums, Any]:
        def total(params: Any) -> tuple[jax.Array, LossSums]:
            sums = loss_sums(params, hidden_states(params, self.buffers, arch, batch)[0], batch, arch)
            return sums.nll, sums

        (_, sums), gradients = jax.value_and_grad(total, has_aux=True)(params)
        return sums, gradients

    def temporaries(self) -> int:
        """Bytes that the compiled gradient needs on a device, on top of its arguments and results."""
        with jax.set_mesh(self.mesh):
            run = jax.jit(lambda params, batch: self._pulled(self.arch, params, batch))
            return run.lower(self.params, self.dealt(packed())).compile().memory_analysis().temp_size_in_bytes


DOCUMENTS = ((11, 23, 9, 21), (40, 16))
"""Tokens of each document of two packed rows; the second row ends in padding."""


def documents() -> list[np.ndarray]:
    """The documents themselves, one more token than predictions."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, MODEL.vocab_size, size + 1) for row in DOCUMENTS for size in row]


def packed() -> Batch:
    """The documents in two rows, positions counted from each one's start."""
    rows, texts = [], iter(documents())
    for sizes in DOCUMENTS:
        parts = [(next(texts), number) for number in range(1, len(sizes) + 1)]
        fill = T - sum(sizes)
        columns = [
            np.concatenate([text[:-1] for text, _ in parts] + [np.zeros(fill)]),
            np.concatenate([text[1:] for text, _ in parts] + [np.zeros(fill)]),
            np.concatenate([np.ones(sum(sizes)), np.zeros(fill)]),
            np.arange(T),
            np.concatenate([np.arange(len(text) - 1) for text, _ in parts] + [np.arange(fill)]),
            np.concatenate([np.full(len(text) - 1, number) for text, number in parts] + [np.zeros(fill)]),
        ]
        rows.append(columns)
    kinds = (np.int32, np.int32, np.float32, np.int32, np.int32, np.int32)
    return Batch(*(np.stack([row[i] for row in rows]).astype(kind) for i, kind in enumerate(kinds)))


def apart() -> Batch:
    """The same documents, each in a row of its own that is filled up."""
    texts = documents()
    sizes = np.asarray([len(text) - 1 for text in texts])[:, None]
    tokens = np.stack([np.pad(text, (0, T + 1 - len(text))) for text in texts]).astype(np.int32)
    order = np.broadcast_to(np.arange(T, dtype=np.int32), (len(texts), T))
    inside = order < sizes
    return Batch(tokens[:, :-1], tokens[:, 1:], inside.astype(np.float32), order, order, inside.astype(np.int32))


def check_packed_loss(strategy: str) -> None:
    """Documents in packed, split rows have the loss and the gradients that they have each by itself on one device."""
    split = Split(strategy)
    (sums, gradients), (wanted, expected) = split.losses(packed()), split.reference(apart())
    ratio = sums.nll / sums.weight / (wanted.nll / wanted.weight)
    assert abs(ratio - 1) <= TOLERANCE, f"the loss of packed rows is {ratio:.3f} times that of their documents"
    error, where = worst_error(gradients, expected)
    assert error <= TOLERANCE, f"{where} is {error:.1e} off"


def errors_of(strategy: str, segments: str) -> dict[str, float]:
    """How far attention over a split row, and dq, dk and dv, are from one device; heads are grouped, keys shared by queries."""
    found = {"striped ring": ("ring", "striped"), "groups": ("hybrid", "zigzag"), "balanced": ("nested", "balanced")}
    way, layout = found.get(strategy, (strategy, "contiguous" if strategy in ("ulysses", "window") else "zigzag"))
    case = {
        "size": 4, "strategy": way, "layout": layout, "mask": "window" if way == "window" else "causal", "scheme": "rope",
        "kernel": "blockwise", "grouping": "gqa", "segments": segments, "softcap": None, "sink": False,
        "groups": "most" if strategy == "groups" else 1,
    }  # fmt: skip
    context_cases.compiled.cache_clear()
    inputs, cotangent = context_cases.inputs_of(case)
    o, gradients = context_cases.context_parallel_attention(case, inputs, cotangent, optimize=False)
    reference, expected = context_cases.program({**case, "groups": 1}, "auto", "dense")(
        inputs, index(segments, "reset", context_cases.T), cotangent
    )
    return distances(o, reference, gradients, expected)


def check_gradients(strategy: str) -> None:
    """dq, dk and dv are those of one device, in float32 to 1e-5 of the largest."""
    found = errors_of(strategy, "packed")
    assert max(found.values()) <= TOLERANCE, found


def check_masked_shard(strategy: str) -> None:
    """A device whose tokens are all padding, and a hop that sees nothing, change no number and make none that is not finite."""
    found = errors_of(strategy, "half")
    assert max(found.values()) <= TOLERANCE, found


FLAGS = {
    "mesh.context=4": ({"context": 1}, {}),
    "mesh.ulysses=4": ({"context_strategy": "ring"}, {"ulysses": 4}),
    "remat=block": ({"remat": "none", "layer_unroll": 1}, {"remat": "block", "layer_unroll": 1}),
    "remat=nested": ({"remat": "attention"}, {"remat": "nested", "remat_every": 2}),
    "head_groups=2": ({"context_strategy": "ring", "head_groups": 1}, {"context_strategy": "ring", "head_groups": 4}),
    "mlp_tile=2": ({"mlp_tile": None}, {"mlp_tile": 2}),
    "loss_tile=64": ({}, {"loss_tile": 64}),
}
"""Options of memory or parallelism: the settings without and with them."""


def check_flag(flag: str) -> None:
    """An option of memory or parallelism shows in the compiled program: it needs another amount of memory."""
    without, given = (Split("", **settings).temporaries() for settings in FLAGS[flag])
    assert without != given, f"{flag} changes nothing: both programs need {given:,} bytes"


MESHES = {"microbatches": ({}, 4), "rows": ({"data": 4}, 1), "rows and tokens": ({"data": 2, "context": 2}, 2)}


def check_denominator(split: str) -> None:
    """The mean loss and its gradient are over all tokens of a batch, however rows with few and many targets are split."""
    sizes, accumulate = MESHES[split]
    mesh = MeshConfig(**{"fsdp": 1, **sizes})
    scheme = {"global": from_config({"name": "rope", "theta": 100.0})}
    arch, buffers = build_architecture(MODEL, ExecutionConfig(), scheme, T)
    table = specs(MODEL, scheme, T)
    devices = jax.devices()[: mesh.data * mesh.context]
    step = TrainStep(arch, tuple(paths_of(table)), OptimConfig(), 10, make_mesh(mesh, devices), accumulate)
    rng = np.random.default_rng(1)
    batch = Batch.from_tokens(rng.integers(0, MODEL.vocab_size, (4, T + 1)))
    weights = np.where(np.arange(T)[None] < np.asarray([[60], [3], [1], [30]]), 1.0, 0.0).astype(np.float32)
    batch = jax.tree.map(np.asarray, batch.replace(loss_weights=weights))
    params = initialize(table, jax.random.key(0))
    state = step.state_from_params(jax.tree.map(jnp.copy, params))
    _, metrics, gradients = step.with_gradients(state, step.to_device(batch, 4), buffers)

    def mean(params: Any) -> jax.Array:
        found = losses.token_losses(params, hidden_states(params, buffers, arch, batch)[0], batch.targets, arch)
        return jnp.sum(found.nll * weights) / weights.sum()

    wanted, expected = jax.value_and_grad(mean)(params)
    ratio = float(metrics["loss"] / wanted)
    assert abs(ratio - 1) <= TOLERANCE, f"the loss is {ratio:.3f} times the mean over all targets"
    error, where = worst_error(jax.device_get(gradients), jax.device_get(expected))
    assert error <= TOLERANCE, f"{where} is {error:.1e} off"


ATTENTION = [name for name in STRATEGIES if name not in ("tiles", "nested")]


@pytest.mark.parametrize("strategy", mostly_slow(STRATEGIES, ("nested",)))
def test_packed_loss(strategy):
    check_packed_loss(strategy)


@pytest.mark.parametrize("strategy", mostly_slow(ATTENTION, QUICK))
def test_gradients(strategy):
    check_gradients(strategy)


@pytest.mark.parametrize("strategy", mostly_slow(ATTENTION, QUICK))
def test_masked_shard(strategy):
    check_masked_shard(strategy)


@pytest.mark.parametrize("flag", mostly_slow(FLAGS, ()))
def test_flag_has_an_effect(flag):
    check_flag(flag)


@pytest.mark.parametrize("split", mostly_slow(MESHES, ()))
def test_denominator(split):
    check_denominator(split)


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A mistake: what it puts in the place of which attribute, and the check, with its argument, that has to notice."""

    where: Any
    name: str
    wrong: Callable[[Any], Any]
    check: Callable[[str], None]
    argument: str


def _sum_of_parts(_: Any) -> Any:
    return lambda one, two: (one[0] + two[0], jnp.logaddexp(one[1], two[1]))


def _naive_merge(_: Any) -> Any:
    def merge(one: Any, two: Any) -> Any:
        top = jnp.logaddexp(one[1], two[1])
        return one[0] * jnp.exp(one[1] - top)[..., None] + two[0] * jnp.exp(two[1] - top)[..., None], top

    return merge


def _own_lse(right: Any) -> Any:
    """The log-sum-exp of the device's own keys in the place of that of all keys."""

    def backward(shard: Any, axis: str, schedule: Any, queries: Any, keys: Any, bias: Any, whole: Any, cotangent: Any) -> Any:
        return right(shard, axis, schedule, queries, keys, bias, shard_attention(shard, queries, keys, bias), cotangent)

    return backward


def _not_sent_home(right: Any) -> Any:
    return lambda axis, shift, tree: tree if shift < -1 else right(axis, shift, tree)


def _wrong_kv_heads(right: Any) -> Any:
    """KV heads dealt in another order than the queries that need them."""
    return lambda axis, x: right(axis, jnp.roll(x, 1, axis=2))


def _own_keys(_: Any) -> Any:
    """A device's own keys, as often as there are devices."""
    return lambda axis, keys: jax.tree.map(lambda x: jnp.concatenate([x] * jax.lax.axis_size(axis), axis=1), keys)


def _index(**wrong: Callable[[Batch], Any]) -> Callable[[Any], Any]:
    """An index of a batch with other arrays in it."""
    return lambda right: property(lambda self: right.fget(self).replace(**{name: make(self) for name, make in wrong.items()}))


def _shifted_after_dealing(right: Any) -> Any:
    def wrong(tree: Any, layout: Any, ring_size: int) -> Any:
        dealt = right(tree, layout, ring_size)
        return dealt.replace(targets=np.roll(dealt.tokens, -1, axis=1))

    return wrong


def _mean_of_its_own(right: Any) -> Any:
    def wrong(self: Any, *args: Any) -> Any:
        total, sums = right(self, *args)
        count = jnp.maximum(sums.weight, 1.0)
        return total / count, sums.replace(nll=sums.nll / count, weight=jnp.ones(()))

    return wrong


def _one_hop_less(right: Any) -> Any:
    return lambda schedule: [(shift, first, last - (last > 1)) for shift, first, last in right(schedule)]


MUTATIONS = {
    "partial results added up": Mutation(ring, "merge", _sum_of_parts, check_gradients, "ring"),
    "an empty part merged by exp(-inf + inf)": Mutation(ring, "merge", _naive_merge, check_masked_shard, "ring"),
    "the last hop left out": Mutation(ring, "_directions", _one_hop_less, check_gradients, "ring"),
    "backward by the own keys' log-sum-exp": Mutation(context, "ring_backward", _own_lse, check_gradients, "ring"),
    "gradients of keys not sent home": Mutation(ring, "_send", _not_sent_home, check_gradients, "ring"),
    "KV heads dealt to the wrong devices": Mutation(context, "keys_for_tokens", _wrong_kv_heads, check_gradients, "ulysses"),
    "a gather of the own keys only": Mutation(gather, "_everybodys", _own_keys, check_gradients, "gather"),
    "documents that see each other": Mutation(
        Batch, "index", _index(segments=lambda batch: jnp.ones_like(batch.segments)), check_packed_loss, "hybrid"
    ),
    "masks by positions in place of order": Mutation(
        Batch,
        "index",
        _index(order=lambda batch: batch.positions, segments=lambda batch: jnp.ones_like(batch.segments)),
        check_packed_loss,
        "ring",
    ),
    "labels shifted after the tokens are dealt": Mutation(
        sys.modules[__name__], "arrange", _shifted_after_dealing, check_packed_loss, "ring"
    ),
    "the mean of the means of microbatches": Mutation(TrainStep, "_loss", _mean_of_its_own, check_denominator, "microbatches"),
    "a policy of memory that is ignored": Mutation(
        transformer, "remat", lambda _: lambda step, policy: step, check_flag, "remat=block"
    ),
    "groups of heads that are ignored": Mutation(
        attending, "choose_groups", lambda _: lambda *args: HeadGroups(), check_flag, "head_groups=2"
    ),
}


def test_there_are_twelve_mutations():
    """At least."""
    assert len(MUTATIONS) >= 12
    assert {mutation.check for mutation in MUTATIONS.values()} == {
        check_packed_loss, check_gradients, check_masked_shard, check_flag, check_denominator,
    }  # fmt: skip


@pytest.mark.parametrize("mistake", mostly_slow(MUTATIONS, ()))
def test_each_mistake_is_noticed(mistake, monkeypatch):
    mutation = MUTATIONS[mistake]
    right = mutation.where.__dict__[mutation.name]
    monkeypatch.setattr(mutation.where, mutation.name, mutation.wrong(right))
    jax.clear_caches()
    with pytest.raises(AssertionError):
        mutation.check(mutation.argument)
    monkeypatch.undo()
    jax.clear_caches()
