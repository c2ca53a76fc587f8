"""How often is the early monitor right? Seeds x thetas, each stage judged early and then run to its end all the same.

    python experiments/003_monitor/run.py --workdir=runs/003_monitor

Two CPU cores, about ten minutes. Resumes: a finished point is not run again. Writes results.json and the tables of README.md beside
this file: for each multiple of the critical base the monitor's verdicts and the needle accuracy at the end of the stage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import jax

from lcx.core import configs
from lcx.core.console import say, table
from lcx.data.loader import Corpus, probe
from lcx.model.architecture import build_architecture, build_schemes
from lcx.positions.theta import critical_base
from lcx.report import markdown
from lcx.training import metrics, monitor
from lcx.training.loading import Loaded, load_params
from lcx.training.loop import train
from lcx.training.stages import RunConfig, run_config

HERE = Path(__file__).parent
MULTIPLES = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
THETA, SHORT, LONG = 50.0, 64, 256
SUCCESS = 0.9
"""A stage succeeded when its needle accuracy reaches this share of the best that its seed reached with any theta."""

SETTINGS = monitor.MonitorConfig(steps=40, probe_rows=64)

SOURCE = {"kind": "stdlib", "limit_bytes": 4_000_000}
TASK = {"needles": 2, "queries": 2, "key_length": 1, "value_length": 2, "answer_weight": 10.0, "haystack_weight": 0.5}


def config(seed: int, **changes: object) -> RunConfig:
    """Base training at `SHORT` tokens; `changes` make the extension of it."""
    values = {
        "model": {
            "model_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "mlp_dim": 128,
            "pattern": ("local", "global"), "window": 16,
        },
        "positions": {"local": {"name": "rope", "theta": 10.0}, "default": {"name": "rope", "theta": THETA}},
        "data": {
            "parts": {
                "text": {"weight": 0.2, "source": SOURCE},
                "needles": {"kind": "multikey", "weight": 0.8, "source": SOURCE, "task": TASK},
            }
        },
        "stages": [{"name": "base", "seq_len": SHORT, "steps": 500, "batch_size": 64}],
        "optim": {"lr": 5e-3, "b2": 0.98, "weight_decay": 0.01, "warmup_steps": 30, "schedule": "linear"},
        "monitor": configs.plain(SETTINGS),
        "checkpoint": {"every": None},
        "metrics": {"writers": "jsonl"},
        "seed": seed,
    }  # fmt: skip
    return run_config({**values, **changes})


def extension(seed: int, base: Path, thetas: list[float]) -> RunConfig:
    """`SHORT` to `LONG` tokens under the monitor."""
    stage = {"name": "extend", "seq_len": LONG, "steps": 120, "batch_size": 16, "monitor": True, "thetas": thetas}
    optim = {"lr": 2e-3, "b2": 0.98, "weight_decay": 0.01, "warmup_steps": 5, "schedule": "linear"}
    return config(seed, stages=[stage], optim=optim, init_from=str(base))


def score(loaded: Loaded, corpus: Corpus, length: int) -> monitor.Probe:
    """A held-out probe of 256 rows at `length`, other rows than the monitor's."""
    model, execution = loaded.run.model, loaded.run.execution
    arch, buffers = build_architecture(model, execution, build_schemes(model, loaded.schemes), length)
    batch = probe(loaded.run.data, length, 256, 10_000 + loaded.run.seed, corpus)
    return monitor.read_probe(monitor.probe_sums(loaded.params, buffers, arch, batch))


def point(seed: int, multiple: float, workdir: Path, corpus: Corpus) -> dict:
    """One stage under the monitor, run to its end whatever the verdict: with a single theta there is nothing to go back to."""
    base = workdir / f"seed{seed}" / "base"
    train(config(seed), base, jax.devices()[:1])
    start = score(load_params(base), corpus, SHORT)
    theta = multiple * critical_base(THETA, SHORT, LONG)
    place = workdir / f"seed{seed}" / f"x{multiple:g}"
    (decision,) = train(extension(seed, base, [theta]), place, jax.devices()[:1]).decisions
    end = score(load_params(place), corpus, LONG)
    return {
        "seed": seed,
        "multiple": multiple,
        "theta": theta,
        "base_accuracy": start.needle_accuracy,
        "losses": [row["loss"] for row in metrics.read(place / "metrics.jsonl")][: SETTINGS.steps],
        "decision": decision,
        "end": dataclasses.asdict(end),
    }


def rollback(workdir: Path, corpus: Corpus) -> dict:
    """A stage that begins at the worst theta, is sent back, and succeeds."""
    base, place = workdir / "seed0" / "base", workdir / "rollback"
    critical = critical_base(THETA, SHORT, LONG)
    result = train(extension(0, base, [MULTIPLES[0] * critical, critical]), place, jax.devices()[:1])
    return {"decisions": list(result.decisions), "end": dataclasses.asdict(score(load_params(place), corpus, LONG))}


def judged(found: dict, settings: monitor.MonitorConfig) -> monitor.Decision:
    """The decision that `settings` make of what was recorded."""
    probes = [monitor.Probe(**found["decision"][name]) for name in ("probe_before", "probe_after", "reference")]
    return monitor.decide(settings, found["losses"], *probes)


def rates(points: list[dict], settings: monitor.MonitorConfig) -> dict:
    """Detection and false-alarm rates under `settings`."""
    counts = {"failed": 0, "caught": 0, "succeeded": 0, "false_alarms": 0}
    for found in points:
        alarm, good = judged(found, settings).verdict == "oscillating", succeeded(found, points)
        counts["succeeded" if good else "failed"] += 1
        counts["false_alarms" if good else "caught"] += alarm
    return {
        **counts,
        "detection": counts["caught"] / max(counts["failed"], 1),
        "false_alarm": counts["false_alarms"] / max(counts["succeeded"], 1),
    }


def succeeded(found: dict, points: list[dict]) -> bool:
    """Did the stage end as well as the seed allows?"""
    return found["end"]["needle_accuracy"] >= SUCCESS * best_of_seed(found, points)


def best_of_seed(found: dict, points: list[dict]) -> float:
    """The best needle accuracy that a point's seed ended at with any theta."""
    return max(other["end"]["needle_accuracy"] for other in points if other["seed"] == found["seed"])


HEAD = (
    "× critical", "alarms", "failed", "runs", "needle accuracy at end", "straightness", "up-pairs", "swing", "text excess",
    "needle excess", "accuracy at the verdict",
)  # fmt: skip


def rows_of(results: dict) -> list[tuple[object, ...]]:
    """For each theta: alarms, failures, and the means of what the monitor saw."""
    rows = []
    for multiple in sorted({found["multiple"] for found in results["points"]}):
        own = [found for found in results["points"] if found["multiple"] == multiple]
        decisions = [judged(found, SETTINGS) for found in own]
        values = [decision.statistics for decision in decisions]

        def mean(name: str, values: list[dict] = values) -> float:
            return sum(value[name] for value in values) / len(values)

        rows.append(
            (
                f"{multiple:g}",
                sum(decision.verdict == "oscillating" for decision in decisions),
                sum(not succeeded(found, results["points"]) for found in own),
                len(own),
                f"{sum(found['end']['needle_accuracy'] for found in own) / len(own):.3f}",
                *(f"{mean(name):.2f}" for name in ("straightness", "up_pairs", "swing", "text_excess", "needle_excess")),
                f"{mean('needle_accuracy'):.3f}",
            )
        )
    return rows


def findings(results: dict) -> str:
    """The rates, and what happened in the run that was sent back."""
    found = rates(results["points"], SETTINGS)
    lines = [
        f"- Detection: {found['caught']} of {found['failed']} stages that failed were stopped ({found['detection']:.0%}).",
        f"- False alarms: {found['false_alarms']} of {found['succeeded']} stages that succeeded were stopped "
        f"({found['false_alarm']:.0%}).",
    ]
    others = rates([point for point in results["points"] if point["seed"]], SETTINGS)
    lines.append(
        f"- Without seed 0, on which the thresholds were chosen: {others['caught']} of {others['failed']} and "
        f"{others['false_alarms']} of {others['succeeded']}."
    )
    for missed in results["points"]:
        verdict = judged(missed, SETTINGS).verdict
        if (verdict == "oscillating") == succeeded(missed, results["points"]):
            lines.append(
                f"- Wrong: seed {missed['seed']} at {missed['multiple']:g} × critical, {verdict}, ended at "
                f"{missed['end']['needle_accuracy']:.3f} where the best of its seed is "
                f"{best_of_seed(missed, results['points']):.3f}."
            )
    if "rollback" in results:
        story = "; then ".join(f"theta {d['theta']:.0f}: {d['verdict']}, {d['reason']}" for d in results["rollback"]["decisions"])
        end = results["rollback"]["end"]
        lines.append(f"- One run sent back for real: {story}. Needle accuracy at its end {end['needle_accuracy']:.3f}.")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, keep it, show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/003_monitor"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--show", action="store_true", help="only make the tables of results.json again")
    args = parser.parse_args()
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"points": []}
    if not args.show:
        corpus = Corpus(config(0).data)
        done = {(found["seed"], found["multiple"]) for found in results["points"]}
        for seed in range(args.seeds):
            for multiple in MULTIPLES:
                if (seed, multiple) not in done:
                    results["points"].append(point(seed, multiple, args.workdir, corpus))
                    path.write_text(json.dumps(results, indent=1) + "\n")
        results["rates"] = rates(results["points"], SETTINGS)
        if "rollback" not in results:
            results["rollback"] = rollback(args.workdir, corpus)
        path.write_text(json.dumps(results, indent=1) + "\n")
    table("the monitor against the stage run to its end", HEAD, rows_of(results))
    say(findings(results))
    markdown.fill(HERE / "README.md", "table", markdown.table(HEAD, rows_of(results)))
    markdown.fill(HERE / "README.md", "findings", findings(results))


if __name__ == "__main__":
    main()
