"""A made-up run with known numbers, for the pictures and the report."""

import json
import math
import pathlib

from lcx.evals import results
from lcx.evals.results import EvalResult, Measurement
from lcx.evals.statistics import wilson
from lcx.report.plots import StageCurve

LENGTHS = (256, 512, 1024, 4096)
DEPTHS = (0.0, 0.5, 1.0)


def needles(counts: tuple[tuple[int, ...], ...], trained: int = 256, items: int = 20, scheme: str = "none") -> EvalResult:
    """Counts of needles found, `[depth][length]`."""
    rows = (
        Measurement(
            "needles",
            "accuracy",
            length,
            count / items,
            items,
            depth,
            None,
            *wilson(count, items),
            scheme,
            scores=(1.0,) * count + (0.0,) * (items - count),
            digest=f"{length} {depth}",
        )  # fmt: skip
        for depth, row in zip(DEPTHS, counts, strict=True)
        for length, count in zip(LENGTHS, row, strict=True)
    )
    return EvalResult("needles", trained, rows=tuple(rows))


BEFORE_COUNTS, AFTER_COUNTS = ((20, 0, 1, 0), (19, 5, 0, 0), (20, 11, 2, 0)), ((20, 20, 20, 19), (20, 20, 18, 20), (20, 20, 20, 20))
BEFORE, AFTER = needles(BEFORE_COUNTS), needles(AFTER_COUNTS, trained=4096)


def curve(scheme: str, perplexities: tuple[float, ...], trained: int = 256) -> EvalResult:
    rows = []
    for length, value in zip(LENGTHS, perplexities, strict=True):
        nll = math.log(value)
        for metric, loss, n in (("nll", nll, 8192), ("final_nll", nll - 0.1, 256), ("bits_per_byte", nll / math.log(2), 8192)):
            rows.append(Measurement("perplexity", metric, length, loss, n, scheme=scheme))
    edges = zip((0, 1, 16, 256), (1, 16, 256, 4096), (2.0, 1.5, 1.25, math.log(perplexities[-1])), (2, 30, 480, 7680), strict=True)
    for first, end, loss, n in edges:
        rows.append(Measurement("perplexity", "nll_by_position", 4096, loss, n, None, (first, end), scheme=scheme))
    return EvalResult("perplexity", trained, rows=tuple(rows))


CURVES = {
    "unchanged": curve("none", (4.25, 13.5, 44.0, 467.0)),
    "yarn": curve("yarn", (4.25, 5.0, 6.0, 8.75)),
    "theta raised": curve("rope:theta=critical", (4.25, 5.75, 7.75, 14.5)),
    "extended": curve("none", (4.0, 3.75, 3.5, 3.25), trained=4096),
}

STAGES = (
    StageCurve("base", 256, 500.0, tuple(range(1, 41)), tuple(5.0 * 0.95**i + 1 for i in range(40))),
    StageCurve("far", 4096, 900.0, tuple(range(41, 51)), (2.5, 2.0) * 5, kept=False),
    StageCurve("far", 4096, 31000.0, tuple(range(41, 61)), tuple(1.0 + 0.9**i for i in range(20))),
)


def write_run(workdir: pathlib.Path) -> None:
    yarn = needles(((20, 7, 3, 1),) * 3, scheme="yarn")
    rows = BEFORE.rows + yarn.rows + CURVES["unchanged"].rows + CURVES["yarn"].rows + CURVES["theta raised"].rows
    before = EvalResult("before", 256, 40, rows, 3.0)
    after = EvalResult("after", 4096, 60, AFTER.rows + CURVES["extended"].rows, 2.0)
    results.write(before, workdir / "eval" / "before.json")
    results.write(after, workdir / "eval" / "after.json")
    config = {
        "model": {"model_dim": 77},
        "stages": [{"name": "base", "seq_len": 256, "batch_size": 8}, {"name": "far", "seq_len": 4096, "batch_size": 2}],
    }
    (workdir / "config.json").write_text(json.dumps(config))
    tries: dict[str, int] = {}
    with (workdir / "metrics.jsonl").open("w") as file:
        for stage in STAGES:
            attempt = tries.get(stage.name, 0)
            tries[stage.name] = attempt + 1
            for step, loss in zip(stage.steps, stage.loss, strict=True):
                row = {"step": step, "stage": stage.name, "attempt": attempt, "loss": loss, "seq_len": stage.length}
                if stage.name == "far":  # needles are in every other step only
                    row["loss_by_part"] = {"text": loss + 0.5} | ({"needles": loss - 0.5} if step % 2 else {})
                file.write(json.dumps({**row, "theta": stage.theta, "tokens_per_second": 1024.0}) + "\n")
        file.write('{"step": 61, "stage": "far", "lo')  # cut off by a kill
    decisions = [
        {"stage": "far", "attempt": 0, "theta": 900.0, "verdict": "oscillating", "reason": "straightness 0.31 is below 1.0"},
        {"stage": "far", "attempt": 1, "theta": 31000.0, "verdict": "straight down", "reason": "loss falls 40.0%"},
    ]
    (workdir / "decisions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in decisions))
