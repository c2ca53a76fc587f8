"""All evaluations of one checkpoint, under its own positional scheme and any other, into one JSON.

Legend: R rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Mapping

import numpy as np

from lcx.core import configs
from lcx.core.console import Progress, say
from lcx.core.errors import UserError
from lcx.core.mesh import mesh_of
from lcx.core.trees import Tree
from lcx.data.config import DataConfig, PartConfig
from lcx.data.sources import sources
from lcx.data.tasks import Task
from lcx.data.tokenizers import tokenizers
from lcx.evals import needles, results
from lcx.evals.perplexity import bytes_per_token, perplexity, spans
from lcx.evals.results import EvalResult, NeedleGrid, PerplexityCurve
from lcx.evals.scoring import Scorer, model_scorer
from lcx.evals.zero_shot import at_length, check, refuse_learned
from lcx.model.architecture import Architecture, build_architecture
from lcx.model.config import ModelConfig
from lcx.model.decode import generate
from lcx.model.execution import ExecutionConfig
from lcx.positions.scheme import Scheme


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What to measure.

    `lengths` in tokens, answers included; `depths` from 0 (start) to 1 (just before the question); `needle_items` in each cell.
    `zero_shot` are schemes to try besides the checkpoint's own (`lcx.evals.zero_shot.at_length`), with `zero_shot_items` needles a
    cell (0: perplexity alone). `generation_items` needles a cell are answered by greedy generation too (0: none).
    `perplexity_tokens` held-out tokens are scored at each length (0: none), in windows that move on by `stride` (None: the
    window), and the last `final_tokens` of each span are reported apart (None: half the shortest length).
    `text` and `task` name the parts of the data mixture that give held-out text and needles (None: the first of each kind).
    `tokens_per_forward` bounds memory: rows x length of one pass, one row at least. `effective_threshold` is the mean over depths
    that a length must exceed to count as reached (RULER's 85.6%).
    """

    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    needle_items: int = 20
    zero_shot: tuple[str, ...] = ()
    zero_shot_items: int = 4
    generation_items: int = 0
    perplexity_tokens: int = 1 << 16
    stride: int | None = None
    final_tokens: int | None = None
    text: str | None = None
    task: str | None = None
    tokens_per_forward: int = 1 << 14
    effective_threshold: float = 0.856
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 2 or len(set(self.lengths)) < len(self.lengths):
            raise UserError(f"evals.lengths={self.lengths} must be different lengths of at least 2 tokens")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise UserError(f"evals.depths has {depth}; depths are fractions from 0 (start) to 1 (just before the question)")
        configs.positive("evals", tokens_per_forward=self.tokens_per_forward, stride=self.stride, final_tokens=self.final_tokens)
        for name in ("needle_items", "zero_shot_items", "generation_items", "perplexity_tokens", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"evals.{name}={getattr(self, name)} must not be negative; 0 leaves it out")
        if not 0 < self.effective_threshold < 1:
            raise UserError(f"evals.effective_threshold={self.effective_threshold} must be between 0 and 1")
        for spec in self.zero_shot:
            check(spec)


@dataclasses.dataclass(frozen=True)
class Materials:
    """What every scheme is measured on: the same spans of text and the same needle items."""

    text: np.ndarray | None
    joined: bool
    bytes_per_token: float
    items: Mapping[int, needles.Items]

    def few(self, count: int, cells: int) -> dict[int, needles.Items]:
        """The first `count` items of each of `cells` cells."""
        out = {}
        for length, items in self.items.items():
            keep = np.concatenate([np.flatnonzero(items.cell == cell)[:count] for cell in range(cells)])
            out[length] = needles.Items(length, items.tokens[keep], items.answer[keep], items.cell[keep])
        return out


def gather(data: DataConfig, config: EvalConfig) -> Materials:
    """Held-out text and fresh needle items; raises `UserError` when the held-out documents cannot fill the longest length."""
    tokenizer = tokenizers.load(data.tokenizer)
    heldout = functools.cache(
        lambda source: sources.split(sources.load(source, tokenizer, data.chat_template), data.heldout_fraction, "heldout")
    )
    text, joined, size = None, False, 1.0
    if config.perplexity_tokens:
        longest = max(config.lengths)
        part = _part(data, config.text, "text", is_task=False)
        text, joined = spans(heldout(part.source), longest, max(1, config.perplexity_tokens // longest), config.seed)
        size = bytes_per_token(text, tokenizer)
    items: dict[int, needles.Items] = {}
    most = max(config.needle_items, config.zero_shot_items * bool(config.zero_shot), config.generation_items)
    if most and config.depths and (config.task or any(part.is_task for part in data.parts.values())):
        part = _part(data, config.task, "task", is_task=True)
        task = Task(part.kind, part.task, tokenizer)
        for length in config.lengths:
            items[length] = needles.write_items(task, heldout(part.source), length, config.depths, most, config.seed)
    return Materials(text, joined, size, items)


def evaluate(
    params: Tree,
    model: ModelConfig,
    execution: ExecutionConfig,
    schemes: Mapping[str, Scheme],
    data: DataConfig,
    config: EvalConfig,
    *,
    trained: int,
    label: str = "eval",
    step: int | None = None,
    workdir: str | os.PathLike[str] | None = None,
    announce: Callable[[str], None] = say,
) -> EvalResult:
    """Measure a checkpoint trained up to `trained` tokens; with a workdir, write `eval/<label>.json` there.

    `schemes` maps layer kinds to the scheme that the checkpoint was last trained under. Under `zero_shot` specs the factor is
    length / trained, chosen at each length unless the spec fixes it.
    """
    started = time.perf_counter()
    for spec in config.zero_shot:
        # A slip in the last spec is said before the first is measured, not after.
        for length in config.lengths:
            chosen = at_length(schemes, spec, trained, length)
            if spec.strip() != "none":
                refuse_learned(spec, {kind: x for kind, x in chosen.items() if x != schemes[kind]}, model, length)
            build_architecture(model, execution, chosen, length)
    materials = gather(data, config)
    specs = ("none", *(spec for spec in config.zero_shot if spec != "none"))
    grids: list[NeedleGrid] = []
    curves: list[PerplexityCurve] = []
    with Progress(f"{label}: measuring", _measurements(config, materials, len(specs) - 1), every=None) as bar:
        for spec in specs:

            def built(length: int, spec: str = spec) -> tuple[Architecture, Tree]:
                bar.advance(f"{spec} at {length:,}")
                return build_architecture(model, execution, at_length(schemes, spec, trained, length), length)

            def scorer_for(length: int, built=built) -> Scorer:
                return model_scorer(params, *built(length))

            measured = config.needle_items if spec == "none" else config.zero_shot_items
            if materials.items and measured:
                few = materials.few(measured, len(config.depths))
                found = {n: needles.teacher_forced(scorer_for, few[n], config.tokens_per_forward) for n in sorted(few)}
                grids.append(needles.grid(found, few, config.depths, "teacher_forced", spec, trained))
                announce(f"{label}: needles, {spec}: {_by_length(grids[-1])}")
            if materials.items and config.generation_items and spec == "none":
                few = materials.few(config.generation_items, len(config.depths))
                found = {n: _generated(params, *built(n), few[n], config) for n in sorted(few)}
                grids.append(needles.grid(found, few, config.depths, "generation", spec, trained))
                announce(f"{label}: needles by generation: {_by_length(grids[-1])}")
            if materials.text is not None:
                curves.append(
                    perplexity(
                        scorer_for, materials.text, config.lengths, stride=config.stride, final=config.final_tokens,
                        tokens_per_forward=config.tokens_per_forward, bytes_per_token=materials.bytes_per_token,
                        scheme=spec, trained=trained, joined=materials.joined,
                    )
                )  # fmt: skip
                points = "  ".join(f"{p.length:,}: {p.perplexity:.4g}" for p in curves[-1].points)
                announce(f"{label}: perplexity, {spec}: {points}")
    result = EvalResult(
        label, trained, step, tuple(grids), tuple(curves), time.perf_counter() - started, {"evals": configs.plain(config)}
    )
    if workdir is not None:
        results.write(result, pathlib.Path(workdir) / "eval" / f"{label}.json")
    return result


def _measurements(config: EvalConfig, materials: Materials, zero_shot: int) -> int:
    """How many times a length is measured, `zero_shot` schemes and the model's own."""
    grids = 0
    if materials.items:
        grids = bool(config.needle_items) + bool(config.generation_items) + bool(config.zero_shot_items) * zero_shot
    return len(config.lengths) * (grids + (materials.text is not None) * (1 + zero_shot))


def _generated(params: Tree, arch: Architecture, buffers: Tree, items: needles.Items, config: EvalConfig) -> np.ndarray:
    # Where the weights were placed decides: on a context mesh prompts and caches are split as rows are in training.
    with mesh_of(params):
        return needles.generated(functools.partial(generate, params, buffers, arch), items, config.tokens_per_forward)


def _part(data: DataConfig, name: str | None, field: str, *, is_task: bool) -> PartConfig:
    """The named part of the mixture, or the first of its kind."""
    if name is not None:
        part = data.parts[configs.choice(f"evals.{field}", name, data.parts)]
        if is_task and not part.is_task:
            tasks = ", ".join(key for key, value in data.parts.items() if value.is_task)
            raise UserError(f"evals.task={name!r} is a text part; the parts with a retrieval task are: {tasks or 'none'}")
        return part
    # Task parts stand over text as well, so a mixture of tasks alone still has text to read.
    matching = [part for part in data.parts.values() if part.is_task == is_task]
    return (matching or list(data.parts.values()))[0]


def _by_length(grid: NeedleGrid) -> str:
    return "  ".join(f"{length:,}: {100 * share:.0f}%" for length, share in grid.by_length().items())
