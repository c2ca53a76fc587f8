"""How long a run will take, said before its first step.

A stage that has begun takes what its steps have taken so far. For others parts of the model are run for a moment (`Sample`):
a layer without its attention, attention over rows of a few tiles, the loss over some of the vocabulary, and the optimizer's
update. Each takes time in proportion to what it works on: tokens, visited pairs, tokens times entries, trained numbers.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lcx.core.numbers import duration
from lcx.core.trees import num_elements
from lcx.model.flops import step_flops
from lcx.model.transformer import remat_policy
from lcx.training.builder import BuiltStage, StageBuilder
from lcx.training.sample import Sample
from lcx.training.stages import RunConfig

NEGLIGIBLE = 1e10
"""Operations of a run that are not worth a measurement: any machine does them in a few seconds."""

RECENT = 20
"""Steps that a stage's time is the median of."""

RECOMPUTED = {
    "none": (1.0, 1.0),
    "attention": (4 / 3, 1.0),
    "offload": (4 / 3, 1.0),
    "dots": (1.1, 9 / 7),
    "block": (4 / 3, 9 / 7),
    "nested": (5 / 3, 9 / 7),
    "nested_offload": (5 / 3, 9 / 7),
}
"""What the policies of `execution.remat` multiply the time of layers by, and that of their attention, for what they recompute: one
pass of three, and of attention two products of seven."""

WALK = (1 / 3, 2 / 7)
"""What the first walk of `execution.recurrent_chunk` adds to these: a forward pass."""


def forecast(builder: StageBuilder, index: int, at: int, rows: Sequence[Mapping[str, Any]], fewer: str) -> str:
    """The time left to a run at step `at` of stage `index`, with `rows` of metrics, as a sentence; `fewer` names its steps."""
    stages = builder.run.stages
    left = {i: stage.steps - (at if i == index else 0) for i, stage in enumerate(stages) if i >= index}
    left = {i: steps for i, steps in left.items() if steps}
    known = {i: seconds for i in left if (seconds := own_seconds(rows, i, stages[i].batch_size * stages[i].seq_len)) is not None}
    unknown = [i for i in left if i not in known]
    sizes = {i: step_flops(builder.run.model, stages[i].batch_size, stages[i].seq_len) * left[i] for i in unknown}
    if sum(sizes.values()) > NEGLIGIBLE:
        known |= step_seconds(builder.run, [builder.build(i) for i in unknown])
    total = sum(known.get(i, 0.0) * steps for i, steps in left.items())
    more = " more" if at or index else ""
    apart = "without compilation and evaluations"
    if len(known) < len(left) and total < 30:
        return f"the steps take less than a minute{more}, {apart}"
    each = ", ".join(f"{stages[i].name}: {duration(known.get(i, 0.0) * steps)}" for i, steps in left.items())
    shorter = f"; for less, lower {fewer}" if total > 600 else ""
    return f"the steps take about {duration(total)}{more} on this machine ({each}), {apart}{shorter}"


def own_seconds(rows: Sequence[Mapping[str, Any]], index: int, tokens: int) -> float | None:
    """Seconds of a step of stage `index`, of `tokens` tokens, by the newest rows of `metrics.jsonl`; None before its third step."""
    speeds = [row["tokens_per_second"] for row in rows if row["stage_index"] == index][-RECENT:]
    return tokens / statistics.median(speeds) if len(speeds) > 2 else None


def step_seconds(run: RunConfig, stages: Sequence[BuiltStage]) -> dict[int, float]:
    """Seconds of a step of each stage, by its index, from measurements that alike stages share."""
    alike: dict[Any, list[BuiltStage]] = {}
    for built in stages:
        optim, arch = built.step.optim, dataclasses.replace(built.arch, shifted_group=None)
        alike.setdefault((arch, built.mesh, optim.name, optim.freeze), []).append(built)
    found: dict[int, float] = {}
    for group in alike.values():
        sample = Sample(run, max(group, key=lambda built: built.stage.seq_len))
        pair = {kind: sample.attention(kind) for kind in run.model.kinds}
        layer, entry, number = sample.layer(), sample.loss(), sample.update()
        for built in group:
            stage, length = built.stage, run.execution.at_once(built.stage.seq_len)
            tokens, rows = stage.batch_size * stage.seq_len, stage.batch_size // stage.accumulate
            visited = {kind: sample.visited(kind, rows, stage.seq_len, stage.shifted_group) for kind in pair}
            attention = stage.batch_size * sum(pair[kind] * visited[kind] for kind in run.model.layer_kinds)
            again, attended_again = RECOMPUTED[remat_policy(run.execution, length)]
            if length < stage.seq_len:
                again, attended_again = again + WALK[0], attended_again + WALK[1]
            found[built.index] = (
                tokens * (run.model.num_layers * layer * again + run.model.vocab_size * entry)
                + attention * attended_again
                + num_elements(built.step.abstract_state().params) * number
            )
    return found
