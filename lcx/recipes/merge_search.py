"""Weights of a merge, one for each layer, found by the loss of a text that was held out: `lcx merge --tune`.

A merge that is linear in its weights gives all their gradients by one backward pass through the merged model, so they are searched
for by gradient descent (AdaMerging, Yang et al., 2310.02575, does so for the entropy of classifiers).

Legend: M models besides the base, G groups of parameters (those outside the layers, then each layer), N rows, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import yaml

from lcx.core.batch import Batch
from lcx.core.configs import positive
from lcx.core.console import Progress, say
from lcx.core.errors import UserError, naming
from lcx.core.files import write_atomically
from lcx.core.host import available_memory
from lcx.core.trees import Tree, joined
from lcx.data.config import SourceConfig
from lcx.data.sources import documents
from lcx.data.tokenizers import tokenizers
from lcx.merging.merge import Merge
from lcx.merging.methods.span import shares
from lcx.merging.models import LAYER
from lcx.merging.plan import Job
from lcx.model.architecture import Architecture, build_architecture, build_schemes
from lcx.model.loss import token_losses
from lcx.model.transformer import hidden_states
from lcx.recipes import models

METHODS = ("linear", "task_arithmetic")
"""The methods whose results are linear in their weights."""

CHECKS = 6
"""How often in a search the rows that it does not learn from are asked."""


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """What weights are searched by: files of plain text, of which rows of `seq_len` tokens, `tokens` in all, count.

    Without `seq_len`, rows have 512 tokens, or as many as the models were trained for if that is less. Every other row says which
    weights to keep, and is not learned from. `steps` of Adam at the rate `lr` read a row each.
    """

    text: tuple[str, ...]
    seq_len: int | None = None
    tokens: int = 1 << 15
    steps: int = 100
    lr: float = 0.02

    def __post_init__(self) -> None:
        names = ("seq_len", "tokens", "steps", "lr")
        positive("tune", **{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True)
class Found:
    """Weights `[M, G]` of the file and the best ones, and by both the loss of the rows not learned from, in nats a token."""

    before: np.ndarray
    after: np.ndarray
    loss_before: float
    loss_after: float


def search(merge: Merge, config: SearchConfig) -> tuple[Path, Found]:
    """Search for better weights than a merge's file has, and write them to `NAME.tuned.yml` beside it.

    Raises `UserError` for a method that is not linear in its weights, slices, too little text, and more models than memory holds.
    """
    if merge.config.merge_method not in METHODS:
        raise UserError(
            f"{merge.path}: --tune searches weights of merges that are linear in them, which merge_method="
            f"{merge.config.merge_method} is not; take {' or '.join(METHODS)}, or leave --tune out"
        )
    if merge.config.models is None:
        raise UserError(f"{merge.path}: --tune searches weights of whole models; list models in place of slices, or leave it out")
    if laid := next((name for name, model in merge.models.items() if not Path(name).expanduser().is_dir()), None):
        raise UserError(f"{merge.path}: --tune reads whole models, and {laid} is one with changes; write it with `lcx apply` first")
    relative = merge.config.merge_method == "task_arithmetic"
    if not relative and not all(job.values["normalize"] for job in merge.plan.jobs):
        raise UserError(f"{merge.path}: --tune keeps the sum of weights at 1, but parameters.normalize is false; leave that out")
    names = list(merge.models) if relative else list(dict.fromkeys(one.model for one in merge.config.models))
    base = merge.config.base_model if relative and merge.config.base_model else names[0]
    others = [name for name in names if name != base]
    if not others:
        raise UserError(f"{merge.path}: --tune needs a model besides {base}; list one")
    needed = 4 * merge.plan.numbers * (len(names) + 3)
    if needed > (room := available_memory()):
        raise UserError(
            f"--tune holds all models, what they add up to and its gradient, {needed / 1e9:,.1f} GB, and there are "
            f"{room / 1e9:,.1f} GB; give it a larger machine, or set weights by hand"
        )
    texts = _texts(config)
    loaded = models.load(merge.rotary.folder)
    length = config.seq_len or min(512, loaded.meta.length)
    if length > loaded.meta.length:
        raise UserError(
            f"--tune_length={length:,} exceeds the {loaded.meta.length:,} tokens that {merge.rotary.name} was trained for; lower it"
        )
    rows = _rows(config, texts, length, tokenizers.load(models.tokenizer_of(merge.tokenizer, loaded.run.model)))
    arch, buffers = build_architecture(
        loaded.run.model, loaded.run.execution, build_schemes(loaded.run.model, loaded.schemes), length
    )
    params = loaded.params if merge.models[base] is merge.rotary else models.load(merge.models[base].folder).params
    added = [jax.tree.map(jnp.subtract, models.load(merge.models[name].folder).params, params) for name in others]
    found = descend(params, added, _start(merge, others), rows, arch, buffers, config)
    path = merge.path.with_name(f"{merge.path.stem}.tuned.yml")
    write_atomically(path, _yaml(merge, base, others, found))
    better = "" if found.loss_after < found.loss_before else "; no better weights were found"
    losses = f"{found.loss_before:.4f} before, {found.loss_after:.4f} after{better}"
    say(f"loss of the rows not learned from: {losses}; weights in {path}")
    return path, found


def descend(
    base: Tree, added: Sequence[Tree], start: np.ndarray, rows: np.ndarray, arch: Architecture, buffers: Tree, config: SearchConfig
) -> Found:
    """The weights `[M, G]` of `added` to `base` with the least loss of every other one of `rows` `[N, T + 1]`, from `start` on."""

    @jax.jit
    def loss(weights: jax.Array, base: Tree, added: Sequence[Tree], row: jax.Array) -> jax.Array:
        batch = Batch.from_tokens(row[None])
        params = combined(base, added, weights)
        states, _ = hidden_states(params, buffers, arch, batch)
        return jnp.mean(token_losses(params, states, batch.targets, arch).nll)

    transform = optax.adam(config.lr)

    @jax.jit
    def step(weights: jax.Array, state: Any, base: Tree, added: Sequence[Tree], row: jax.Array) -> tuple:
        value, gradient = jax.value_and_grad(loss)(weights, base, added, row)
        updates, state = transform.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, value

    learned, asked = rows[0::2], rows[1::2]
    weights = jnp.asarray(start, jnp.float32)
    state, best = transform.init(weights), []

    def check() -> None:
        mean = float(np.mean([loss(weights, base, added, row) for row in asked]))
        best.append((mean, len(best), np.asarray(weights)))

    check()
    with Progress("tune", config.steps, 0) as bar:
        for i in range(config.steps):
            weights, state, value = step(weights, state, base, added, learned[i % len(learned)])
            if (i + 1) * CHECKS // config.steps > i * CHECKS // config.steps:
                check()
            bar.advance(f"loss {value:.4f}, of the others {best[-1][0]:.4f}")
    first, least = best[0], min(best)
    return Found(np.asarray(start), least[2] if least[1] else np.asarray(start), first[0], least[0])


def combined(base: Tree, added: Sequence[Tree], weights: jax.Array) -> Tree:
    """`base` with each model's `added` parameters by its `weights` `[M, G]`."""

    def one(path: tuple, x: jax.Array, *changes: jax.Array) -> jax.Array:
        layers = joined(path).startswith("layers/")
        shape = (x.shape[0], *(1,) * (x.ndim - 1)) if layers else ()
        for own, change in zip(weights, changes, strict=True):
            x = x + (own[1:] if layers else own[0]).reshape(shape) * change
        return x

    return jax.tree_util.tree_map_with_path(one, base, *added)


def _texts(config: SearchConfig) -> list[str]:
    with naming({"source.path": "--tune"}):
        return [text.decode("utf-8", "replace") for _, text in documents.read(SourceConfig("text", config.text))]


def _rows(config: SearchConfig, texts: Sequence[str], length: int, tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """`[N, T + 1]` tokens of texts."""
    wanted = max(2, config.tokens // length) * (length + 1)
    found: list[np.ndarray] = []
    for text in texts:
        if sum(map(len, found)) < wanted:
            found.append(tokenizer.encode(text[: 16 * wanted]))
    tokens = np.concatenate([*found, np.zeros(0, np.int32)])[:wanted]
    if len(tokens) < 2 * (length + 1):
        raise UserError(
            f"--tune={', '.join(config.text)} has {len(tokens):,} tokens, but two rows of {length + 1:,} are needed; name "
            "more text, or lower --tune_length"
        )
    whole = len(tokens) // (length + 1)
    return tokens[: whole * (length + 1)].reshape(whole, -1).astype(np.int32)


def _start(merge: Merge, others: Sequence[str]) -> np.ndarray:
    """The weights `[M, G]` that a file comes to; where a group's tensors differ, their mean."""
    found: dict[int, list[list[float]]] = {}
    for job in merge.plan.jobs:
        layer = LAYER.fullmatch(job.name)
        found.setdefault(1 + int(layer["layer"]) if layer else 0, []).append(_of_job(job, merge, others))
    return np.stack([np.mean(found[group], axis=0) for group in sorted(found)], axis=1)


def _of_job(job: Job, merge: Merge, others: Sequence[str]) -> list[float]:
    values = job.values.each("weight")
    if job.values["normalize"]:
        values = shares(job.name, values)
    if merge.config.merge_method == "task_arithmetic":
        values = job.values["lambda"] * values
    return [sum(float(value) for one, value in zip(job.models, values, strict=True) if one.model.name == name) for name in others]


def _yaml(merge: Merge, base: str, others: Sequence[str], found: Found) -> str:
    """The merge's file with other weights."""
    weights: dict[str, np.ndarray] = dict(zip(others, found.after, strict=True))
    if merge.config.merge_method == "linear":
        weights[base] = 1 - found.after.sum(axis=0)
        given: Mapping[str, Any] = {"normalize": False}
    else:
        given = {"normalize": False, "lambda": 1.0}
    values = dict(yaml.safe_load(merge.path.read_text(encoding="utf-8-sig")))
    values["parameters"] = given
    values["models"] = [
        {"model": name, "parameters": {"weight": _entries(weights[name])}} for name in merge.models if name in weights
    ]
    text = yaml.safe_dump(values, sort_keys=False)
    return f"# {merge.path.name} with weights by layer of `lcx merge --tune`: loss {found.loss_before:.4f} before, " + (
        f"{found.loss_after:.4f} after.\n{text}"
    )


def _entries(weights: np.ndarray) -> list[dict[str, Any]]:
    layers = [round(float(value), 6) for value in weights[1:]]
    return [{"filter": ".layers.", "value": layers}, {"value": round(float(weights[0]), 6)}]
