"""A row that is walked in chunks has the loss and the gradients of the whole row, and activations of one chunk.

Legend: B batch, T tokens, C tokens of a chunk.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lcx.adapters import lora as adapters
from lcx.adapters.lora import LoraConfig
from lcx.attention.chunks import Chunk, RowChunks
from lcx.attention.spec import AttentionSpec
from lcx.core.batch import PADDING, SHARED, Batch, Index
from lcx.core.errors import UserError
from lcx.core.mask import Mask
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.core.param_spec import initialize, paths_of
from lcx.model import recurrent, transformer
from lcx.model.architecture import build_architecture, build_schemes
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.model.loss import loss_sums
from lcx.model.params import specs
from lcx.planning.program import StepProgram
from lcx.positions.rotary import Rope
from lcx.training import memory
from lcx.training.builder import StageBuilder
from lcx.training.optimizer import OptimConfig
from lcx.training.stages import run_config
from lcx.training.step import TrainStep
from tests.compare import worst_error
from tests.covering import pairwise
from tests.positions.test_registry import TEXTS

B, T, C = 2, 64, 16
MODEL = ModelConfig(
    vocab_size=40, model_dim=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=24, window=10, logit_softcap=8.0
)
Z_LOSS = 0.01

OPTIONS = {
    "scheme": tuple(TEXTS),
    "pattern": ("global", "local", "local global"),
    "rows": ("whole", "packed", "shared", "padding"),
    "chunk": (16, 32, 8),
    "remat": ("none", "attention", "block", "nested"),
    "kernel": ("dense", "blockwise"),
    "kv_heads": (4, 2, 1),
    "other": ("none", "sinks", "softcap", "experts", "tied"),
}
CASES = pairwise(OPTIONS, lambda case: case.get("remat") != "nested" or case.get("pattern") in (None, "global"))
OTHER = {
    "none": {},
    "sinks": {"sinks": True},
    "softcap": {"attention_softcap": 4.0},
    "experts": {"num_experts": 4},
    "tied": {"tied_embeddings": True, "qk_norm": "head", "post_norm": True},
}


def documents(rows: str) -> Batch:
    """Two rows whose documents end in different places, with uneven weights; where documents are masked, positions start anew."""
    rng = np.random.default_rng(0)
    batch = Batch.from_tokens(rng.integers(0, MODEL.vocab_size, (B, T + 1)), rng.random((B, T + 1)).astype(np.float32))
    if rows == "whole":
        return batch
    order = np.broadcast_to(np.arange(T), (B, T))
    ends = np.asarray([[0, 21, 25, 50], [0, 7, 40, 48]])
    segments = np.stack([np.searchsorted(row, order[0], side="right") for row in ends])
    positions = order - np.take_along_axis(ends, segments - 1, axis=1)
    if rows == "shared":
        segments = np.where(order == 0, SHARED, segments)
    if rows == "padding":
        segments = np.where(order >= np.asarray([[60], [27]]), PADDING, segments)
    weights = batch.loss_weights * (segments != PADDING)
    return batch.replace(segments=jnp.int32(segments), positions=jnp.int32(positions), loss_weights=weights)


def problem(case: dict):
    """Parameters, buffers and architecture (of whole rows) of a case."""
    model = dataclasses.replace(
        MODEL, pattern=tuple(case["pattern"].split()), num_kv_heads=case["kv_heads"], **OTHER[case["other"]]
    )
    schemes = build_schemes(model, {"default": TEXTS[case["scheme"]]})
    execution = ExecutionConfig(attention="dense", remat="none")
    arch, buffers = build_architecture(model, execution, schemes, T)
    params = initialize(specs(model, schemes, T), jax.random.key(0))
    # Away from zero, where sinks, biases and norms begin.
    params = jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), params)
    return params, buffers, arch


def objective(arch, params, states, batch):
    sums = loss_sums(params, states, batch, arch)
    return sums.nll + Z_LOSS * sums.z, sums


@functools.partial(jax.jit, static_argnums=2)
def whole_row(params, buffers, arch, batch):
    def loss(params):
        return objective(arch, params, transformer.hidden_states(params, buffers, arch, batch)[0], batch)

    (_, sums), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return sums, gradients


@functools.partial(jax.jit, static_argnums=2)
def in_chunks(params, buffers, arch, batch):
    return recurrent.sums_and_gradients(functools.partial(objective, arch), lambda x: x, params, buffers, arch, batch)


QUICK = [("t5", "local global")]
"""Of this the first case."""


def is_quick(case: dict) -> bool:
    """Whether a case is one of the quick tests."""
    kind = (case["scheme"], case["pattern"])
    return kind in QUICK and case == next(one for one in CASES if (one["scheme"], one["pattern"]) == kind)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (not is_quick(case)), id="-".join(map(str, case.values()))) for case in CASES],
)
def test_chunks_equal_the_whole_row(case):
    params, buffers, arch = problem(case)
    batch = documents(case["rows"])
    wanted = whole_row(params, buffers, arch, batch)
    execution = ExecutionConfig(recurrent_chunk=case["chunk"], attention=case["kernel"], remat=case["remat"])
    got = in_chunks(params, buffers, dataclasses.replace(arch, execution=execution), batch)
    error, where = worst_error(got, wanted)
    assert error <= 1e-5, where


def test_a_chunk_visits_no_chunk_that_is_hidden():
    """Not the later ones, not those behind the window, not those of other documents, and none of padding."""
    order = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (1, T))
    segments = jnp.where(order < 2 * C, 1, jnp.where(order < 3 * C, 2, PADDING))
    specs = {name: AttentionSpec(Mask(window=window), Rope().spec(T), 1.0) for name, window in (("global", None), ("local", 10))}

    @functools.partial(jax.jit, static_argnums=0)
    def chunks(kind, segments):
        row = RowChunks.build(Index(order, order, segments), C, {})
        return jax.vmap(lambda number: Chunk.build(specs[kind], row, number))(jnp.arange(T // C))

    def visited(kind, segments):
        found = chunks(kind, segments)
        return [sorted(numbers[:count].tolist()) for numbers, count in zip(found.visited, found.count, strict=True)]

    assert visited("global", jnp.ones_like(order)) == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert visited("local", jnp.ones_like(order)) == [[0], [0, 1], [1, 2], [2, 3]]
    assert visited("global", segments) == [[0], [0, 1], [2], []]


MESH = MeshConfig(fsdp=1)
LORA = LoraConfig(rank=2, targets=("layers/attention/(query|value)/", "head/kernel"), base_dtype="bfloat16")


def stepped(batch, lora, accumulate, **execution):
    """Metrics and gradients of a step."""
    model = dataclasses.replace(MODEL, pattern=("local", "global"))
    schemes = build_schemes(model, {"default": "rope:theta=500", "local": "t5:buckets=8"})
    arch, buffers = build_architecture(model, ExecutionConfig(**execution), schemes, T)
    table = specs(model, schemes, T) if lora is None else adapters.specs(specs(model, schemes, T), lora)
    optim = OptimConfig(lr=1e-2, z_loss=Z_LOSS)
    step = TrainStep(arch, tuple(paths_of(table)), optim, 4, make_mesh(MESH, jax.devices()[:1]), accumulate, lora)
    state = step.state_from_params(initialize(step.specs, jax.random.key(1)))
    after, metrics, gradients = step.with_gradients(state, step.to_device(batch, B), buffers)
    return jax.device_get((after.params, metrics, gradients))


@pytest.mark.parametrize(("lora", "accumulate"), [(None, 2), pytest.param(LORA, 1, marks=pytest.mark.slow)])
def test_a_step_is_that_of_whole_rows(lora, accumulate):
    """Microbatches, frozen weights, the losses of a mixture's parts and the update are as they were."""
    batch = jax.tree.map(np.asarray, documents("packed")).replace(row_parts=np.asarray([1, 0], np.int32), num_parts=3)
    wanted = stepped(batch, lora, accumulate)
    got = stepped(batch, lora, accumulate, recurrent_chunk=C)
    assert np.isnan(got[1]["loss_by_part"][2]) and np.isnan(wanted[1]["loss_by_part"][2])
    for tree in (got, wanted):
        tree[1]["loss_by_part"] = tree[1]["loss_by_part"][:2]
    error, where = worst_error(got[1:], wanted[1:])
    assert error <= 1e-5, where
    # Adam's first step divides gradients by their size: what is far below it may turn either way.
    error, where = worst_error(got[0], wanted[0])
    assert error <= 1e-3, where


@pytest.mark.parametrize("length", [T - 3, pytest.param(T, marks=pytest.mark.slow)])
def test_states_without_gradients_are_those_of_the_whole_row(length):
    params, buffers, arch = problem({"pattern": "local global", "kv_heads": 2, "other": "sinks", "scheme": "self_extend"})
    batch = jax.tree.map(lambda x: x[:, :length], documents("shared"))
    walked = dataclasses.replace(arch, execution=ExecutionConfig(recurrent_chunk=C))
    run = jax.jit(recurrent.hidden_states, static_argnums=2)
    assert worst_error(run(params, buffers, walked, batch), run(params, buffers, arch, batch))[0] <= 1e-5


def temporaries(length: int) -> int:
    """Bytes of what a compiled step holds besides its arguments and results."""
    model = {**tiny.config()["model"], "num_kv_heads": 1}
    stage = {"name": "long", "seq_len": length, "steps": 1, "batch_size": 1}
    run = run_config(tiny.config(model=model, stages=[stage], execution={"recurrent_chunk": 512}))
    built = StageBuilder(run, [], jax.devices()[:1]).build(0)
    batch = StepProgram(run, built.stage, built.mesh, built.step, built.buffers).batch()
    found = built.step.compile(built.step.abstract_state(), batch, built.buffers).memory_analysis()
    return found.temp_size_in_bytes


def test_activations_do_not_grow_with_the_row():
    """Of a longer row there are only more keys, values, their gradients, and a few numbers a token."""
    run = run_config(tiny.config(model={**tiny.config()["model"], "num_kv_heads": 1}))
    short, long = 4096, 16384
    keys = memory.key_bytes(run.model, run.execution, 1, long - short)
    more = temporaries(long) - temporaries(short)
    assert keys <= more <= keys + 32 * (long - short)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mesh": {"fsdp": 2}}, "walks a row on one device, but stages.long has a mesh of 2"),
        ({"stages": [{"name": "long", "seq_len": 96, "steps": 1, "batch_size": 2}]}, "try 64 or 128"),
        ({"stages": [{"name": "long", "seq_len": 128, "steps": 1, "batch_size": 2, "shifted_group": 32}]}, "shifted_group=32"),
        ({"model": {**tiny.config()["model"], "num_experts": 2, "router_aux_weight": 0.1}}, "router_aux_weight=0.1 to 0"),
        ({"execution": {"recurrent_chunk": 0}}, "must be above 0"),
    ],
)
def test_what_it_cannot_do_is_said(changes, says, devices):
    stage = {"name": "long", "seq_len": 128, "steps": 1, "batch_size": 2}
    values = tiny.config(**{"stages": [stage], "execution": {"recurrent_chunk": 64}, **changes})
    with pytest.raises(UserError, match="recurrent_chunk=") as caught:
        StageBuilder(run_config(values), [], devices[: values["mesh"]["fsdp"]])
    assert says in str(caught.value)


def test_rows_of_one_chunk_are_whole():
    run = run_config(tiny.config(execution={"recurrent_chunk": 128}, mesh={"fsdp": 2}))
    assert not recurrent.in_several(StageBuilder(run, [], jax.devices()[:2]).build(1).arch, 128)
