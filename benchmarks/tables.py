"""Makes the tables of benchmarks/README.md from the figures in benchmarks/results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcx.attention.parallel.context import choose_strategy
from lcx.attention.parallel.head_groups import Share
from lcx.core.chips import CHIPS
from lcx.core.mask import Mask
from lcx.report import markdown

HERE = Path(__file__).resolve().parent

STEPS_HEADER = ("tokens", "rows", "side", "tok/s", "ratio", "MiB", "ratio")
WAYS_HEADER = ("tokens", "way", "seconds", "ratio", "MiB a device", "ratio", "error")


def train_step(found: dict[str, Any]) -> str:
    """A row a side and length."""
    return markdown.table(STEPS_HEADER, (row for result in found["results"] for row in steps(result).values()))


def steps(result: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The columns of `STEPS_HEADER` of each side at one length."""
    rows = {}
    for side, speed in result["tokens_per_second"].items():
        names = ("speed_ratio", "memory_ratio")
        speed_ratio, memory_ratio = (f"{result[name][side]:.2f}" if side in result[name] else "" for name in names)
        size = f"{result['peak_bytes'][side] / 2**20:,.0f}"
        rows[side] = (f"{result['length']:,}", str(result["rows"]), side, f"{speed:,.0f}", speed_ratio, size, memory_ratio)
    return rows


def attention(found: list[dict[str, Any]]) -> str:
    """A row a shape."""
    names = list(dict.fromkeys(name for row in found for name in row["seconds"]))
    header = ("rows x tokens x heads x dim", *names, "causal / full", "block pairs visited")
    rows = []
    for row in found:
        wall = {name: row["seconds"][name]["wall"] for name in names if name in row["seconds"]}
        share = row.get("causal block pairs")
        rows.append(
            (
                " x ".join(f"{n:,}" for n in row["shape"]), *(f"{wall[name]:.3f}" if name in wall else "" for name in names),
                f"{wall['causal'] / wall['full']:.2f}", "" if share is None else f"{share:.3f}",
            )
        )  # fmt: skip
    return markdown.table(header, rows)


def context_parallel(found: dict[str, Any]) -> str:
    """A row a way and length."""
    return markdown.table(WAYS_HEADER, ways(found["rows"]))


def import_hf(found: dict[str, Any]) -> str:
    """A row a way of reading."""
    header = ("reading", "layers", "GB", "seconds", "ratio", "GiB beside the weights")
    files = found["best"]["files"]["seconds"]
    rows = []
    for side, row in found["best"].items():
        beside = f"{row['beside'] / 2**30:.2f}" if "beside" in row else ""
        size, seconds = f"{row['bytes'] / 1e9:.2f}", row["seconds"]
        rows.append((side, found["layers"], size, f"{seconds:.1f}", f"{seconds / files:.2f}", beside))
    return markdown.table(header, rows)


def merging(found: dict[str, Any]) -> str:
    """A row a method and side."""
    header = ("method", "side", "GB in", "GB out", "seconds", "ratio", "processor seconds", "GiB")
    rows = []
    for method, sides in found["summary"].items():
        for side, row in sides.items():
            sizes = (f"{times * found['bytes'] / 1e9:.1f}" for times in (2, 1))
            figures = (
                f"{row['seconds']:.1f}",
                f"{row['ratio']:.2f}",
                f"{row['processor_seconds']:.0f}",
                f"{row['bytes'] / 2**30:.2f}",
            )
            rows.append((method, side, *sizes, *figures))
    return markdown.table(header, rows)


def checksums(found: dict[str, Any]) -> str:
    """A row a direction and clock: seconds without checksums and with them."""
    rows = [
        (what, *(f"{row[side]:.2f}" for side in ("without", "with")), f"{row['ratio']:.3f}")
        for what, row in found["summary"].items()
    ]
    return markdown.table(("what", "without, s", "with, s", "ratio"), rows)


def ways(rows: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The columns of `WAYS_HEADER`, with ratios to the fastest run of the peer at the same length where there is one."""
    for row in rows:
        peers = [other for other in rows if other["length"] == row["length"] and other["way"].startswith("ringattention")]
        best = min(peers, key=lambda other: min(other["seconds"]), default=None)
        seconds, memory = min(row["seconds"]), row["temporary_bytes"]
        time_ratio, memory_ratio = "", ""
        if best is not None:
            time_ratio, memory_ratio = f"{seconds / min(best['seconds']):.2f}", f"{memory / best['temporary_bytes']:.2f}"
        yield (
            f"{row['length']:,}", row["way"], f"{seconds:.2f}", time_ratio, f"{memory / 2**20:.1f}", memory_ratio,
            f"{row['error']:.1e}",
        )  # fmt: skip


def generation(found: dict[str, Any]) -> str:
    """A row a batch size and phase, each on both clocks."""
    header = ("prompts x tokens + new", "phase", "clock", "lcx tok/s", "torch tok/s", "ratio")
    rows = []
    for result in found["results"]:
        case = f"{result['rows']} x {result['length']:,} + {result['new']:,}"
        for phase in ("decode", "prefill"):
            for clock, name in (("wall", "wall"), ("cpu", "processor")):
                speed = result[f"{phase}_{clock}"]
                rows.append((case, phase, name, f"{speed['lcx']:,.1f}", f"{speed['torch']:,.1f}", f"{speed['ratio']:.2f}"))
    return markdown.table(header, rows)


def long_prompt(found: dict[str, Any]) -> str:
    """One row."""
    long, mib = found["long"], 2**20
    header = ("tokens", "chunk", "temporary MiB", "cache MiB", "chunk x keys MiB", "T x S MiB", "prefill tok/s", "decode tok/s")
    sizes = (long[f"{name}_bytes"] / mib for name in ("temporary", "cache", "chunk_by_keys", "all_by_all"))
    speeds = (long[f"{name}_tokens_per_second"] for name in ("prefill", "decode"))
    return markdown.table(
        header, [(f"{long['length']:,}", f"{long['chunk']:,}", *(f"{x:,.0f}" for x in sizes), *(f"{x:,.0f}" for x in speeds))]
    )


def adapters(found: dict[str, Any]) -> str:
    """A row a side and length, with ratios to lcx's full step and to the peer that trains the same parameters."""
    rows = []
    for result in found["results"]:
        speeds, peaks = result["tokens_per_second"], result["peak_bytes"]
        for side, speed in speeds.items():
            cells = [result["machine"]["processor"], f"{result['length']:,}", result["dtype"], side]
            for values, own, unit, form in ((speeds, speed, 1, ",.1f"), (peaks, peaks[side], 2**20, ",.0f")):
                cells.append(f"{own / unit:{form}}")
                for other in ("lcx, full", "transformers, full", "peft, LoRA"):
                    cells.append(f"{own / values[other]:.2f}" if other in values else "")
            rows.append(tuple(cells))
    ratios = ("of lcx, full", "of transformers", "of peft")
    return markdown.table(("processor", "tokens", "type", "side", "tok/s", *ratios, "MiB", *ratios), rows)


def evaluation(found: dict[str, Any]) -> str:
    """A row a measurement: lcx, its peer, and their ratio."""
    rows = []
    if "ruler" in found:
        seconds = found["ruler"]["seconds"]
        for side, took in seconds.items():
            if side != "lcx":
                what = f"RULER at {found['ruler']['length']:,}, {found['ruler']['prompts']} prompts"
                same = found["ruler"]["same_answers"][side]
                rows.append(
                    (what, f"{seconds['lcx']:.0f}", side, f"{took:.0f}", f"{took / seconds['lcx']:.2f}×", f"{100 * same:.0f}%")
                )
    for length, result in found["grid"].items():
        shared, apart = (result["seconds"][side] for side in ("shared", "apart"))
        what, ratio = f"needle grid at {int(length):,}, {result['prompts']} prompts", f"{apart / shared:.2f}×"
        same = result["same_answers"]["apart"]
        rows.append((what, f"{shared:.0f}", "lcx, nothing shared", f"{apart:.0f}", ratio, f"{100 * same:.0f}%"))
    return markdown.table(("what", "lcx, s", "peer", "peer, s", "times as fast", "same answers"), rows)


def gpu_attention(found: dict[str, Any]) -> str:
    """A row a shape: milliseconds with the setting that runs now, with the one before, and torch's two ways."""
    by_shape: dict[tuple, dict[str, float]] = {}
    for row in found["attention"]:
        by_shape.setdefault((row["T"], row["N"], row["KV"], row["H"]), {})[row["side"]] = row["both_ms"]
    rows = []
    for (length, heads, kv_heads, dim), took in by_shape.items():
        default, flash = took["torch default"], took["torch flash"]
        now = took.get("lcx")
        shown = ("not measured", "", "") if now is None else (f"{now:,.1f}", f"{now / default:.2f}", f"{now / flash:.2f}")
        size = f"{length:,} x {heads} x {kv_heads} x {dim}"
        before = took.get("lcx, eight warps")
        rows.append((size, shown[0], "" if before is None else f"{before:,.1f}", f"{default:,.1f}", f"{flash:,.1f}", *shown[1:]))
    header = ("tokens x heads x KV heads x dim", "lcx", "with eight warps", "torch, default (cuDNN)", "torch, its flash kernel")
    return markdown.table((*header, "lcx / default", "lcx / flash"), rows)


def curation_filters(found: dict[str, Any]) -> str:
    """A row a set of filters: documents that each side keeps, and on how many the decisions are the same."""
    rows = []
    for name, as_published in found["agreement"].items():
        same_words = found["agreement_same_words"][name]
        kept = (
            f"{one['kept'][side]:,}"
            for one, side in ((as_published, "lcx"), (as_published, "datatrove"), (same_words, "datatrove"))
        )
        same = (f"{one['same'] / found['documents']:.2%}" for one in (as_published, same_words))
        rows.append((name, *kept, *same))
    header = ("filters", "lcx keeps", "datatrove keeps", "with lcx's words", "same decisions", "with lcx's words")
    return markdown.table(header, rows)


def curation_speed(found: dict[str, Any]) -> str:
    """A row a clock: both sides' speed with all filters."""
    rows = []
    for clock, name in (("wall", "wall"), ("cpu", "processor")):
        speed = found["megabytes_per_second"][clock]
        rows.append((name, f"{speed['lcx']:.2f}", f"{speed['datatrove']:.2f}", f"{speed['ratio']:.1f}"))
    return markdown.table(("clock", "lcx MB/s", "datatrove MB/s", "ratio"), rows)


def products(found: dict[str, Any]) -> str:
    """A row a product: GFLOP/s of both libraries; and the tokens/s that all products of a step allow."""
    rows = []
    for one in found["products"]:
        rate = {side: one["operations"] / taken / 1e9 for side, taken in one["seconds"].items()}
        rows.append((one["weight"], one["product"], *(f"{rate[side]:.0f}" for side in rate), f"{rate['jax'] / rate['torch']:.2f}"))
    bound = found["bound_tokens_per_second"]
    sides = (f"{bound[side]:.1f} tok/s" for side in ("jax", "torch"))
    rows.append(("all of a step", "", *sides, f"{bound['jax'] / bound['torch']:.2f}"))
    return markdown.table(("weight", "product", "JAX GFLOP/s", "torch GFLOP/s", "ratio"), rows)


_CURATED = ("workers", "MB", "documents", "wall s", "MB/s", "CPU s", "MB per CPU s", "MiB")


def curation_pipeline(found: dict[str, Any]) -> str:
    """A row a number of workers: medians of the turns, memory of all processes together."""
    return markdown.table(_CURATED, [_curated(*item) for item in found["turns"].items()])


def curation_grown(found: dict[str, dict[str, Any]]) -> str:
    """The same, a row a size and number of workers."""
    rows = [_curated(*item) for size in sorted(found, key=float) for item in found[size]["turns"].items()]
    return markdown.table(_CURATED, rows)


def _curated(workers: str, turns: list[dict[str, Any]]) -> tuple[str, ...]:
    wall, cpu = (statistics.median(turn[clock] for turn in turns) for clock in ("wall", "cpu"))
    size, peak = turns[0]["bytes"] / 1e6, max(turn["peak_bytes"] for turn in turns) / 2**20
    speeds = (f"{wall:,.1f}", f"{size / wall:.1f}", f"{cpu:,.1f}", f"{size / cpu:.1f}")
    return workers, f"{size:,.1f}", f"{turns[0]['read']:,}", *speeds, f"{peak:,.0f}"


Cells = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""The header and the rows of a table."""


def balance_counts(found: list[dict[str, Any]]) -> Cells:
    """A row a kind of documents and number of devices: of `balanced` the worst in work and bytes and the mean rate, of the other
    layout the means."""
    own, other = ("busiest", "with waiting", "sent", "rate"), ("busiest", "longest", "sent", "rate")
    names = ("documents", "window", "devices x tokens", "documents a row", *own, "of 8's", "nothing hidden", "of 8's")
    header = (*names, f"other layout: {own[0]}", *own[1:], "ms to deal")
    lines, of_eight = [], {}
    for row in found:
        cells = [row["kind"], f"{row['window']:,}" if row["window"] else "", f"{row['devices']} x {row['tokens']:,}"]
        cells += [f"{statistics.fmean(row['documents']):,.0f}"]
        cells += [f"{max(row[f'balanced {name}']):{form}}" for name, form in zip(other, (".3f", ".3f", ".1f"), strict=False)]
        for name in ("rate", "exposed rate"):
            rate = statistics.fmean(row[f"balanced {name}"])
            # Over that with as many tokens on each of 8 devices, which come first.
            few = of_eight.setdefault((row["kind"], row["window"], row["tokens"], name), rate)
            cells += [f"{rate:.2f}", f"{rate / few:.2f}" if row["devices"] > 8 else ""]
        cells += [f"{statistics.fmean(row[f'other {name}']):.{digits}f}" for name, digits in zip(other, (2, 2, 1, 2), strict=True)]
        lines.append((*cells, f"{statistics.median(row['milliseconds']):.0f}"))
    return header, lines


def balance_seconds(found: dict[str, Any]) -> Cells:
    """A row a kind of documents: seconds in both layouts, the best turn."""
    lines = []
    for kind, seconds in found["seconds"].items():
        zigzag, ours = (min(seconds[layout]) for layout in ("zigzag", "balanced"))
        lines.append((kind, f"{found['length']:,}", f"{zigzag:.2f}", f"{ours:.2f}", f"{zigzag / ours:.2f}"))
    return ("documents", "tokens", "zigzag, s", "balanced, s", "times as fast"), lines


def strategies(found: dict[str, Any]) -> Cells:
    """A row a cell: seconds by strategy, the best turn, what `auto` takes, and that over the fastest."""
    names = ("gather", "ring", "window")
    lines = []
    for row in found["cells"]:
        best = {name: min(turns) for name, turns in row["seconds"].items()}
        mask = Mask(window=found["window"]) if row["mask"] == "window" else Mask()
        here = Share(1, row["tokens"], found["heads"], row["kv_heads"], 64, 1, found["devices"])
        taken = choose_strategy("auto", mask, row["layout"], here, CHIPS["cpu"]).strategy
        seconds = (f"{best[name]:.3f}" if name in best else "" for name in names)
        ratio = f"{best[taken] / min(best.values()):.2f}"
        lines.append((f"{row['tokens']:,}", f"{row['kv_heads']}", row["mask"], *seconds, taken, ratio))
    return ("tokens a device", "KV heads", "mask", *(f"{name}, s" for name in names), "`auto`", "over the fastest"), lines


def main() -> None:
    """Fill in what has been measured."""
    for make in (
        train_step,
        attention,
        context_parallel,
        import_hf,
        checksums,
        merging,
        adapters,
        products,
        generation,
        evaluation,
    ):
        path = HERE / "results" / f"{make.__name__}.json"
        if path.exists():
            markdown.fill(HERE / "README.md", make.__name__, make(json.loads(path.read_text())))
    other = HERE / "results" / "train_step_other.json"
    markdown.fill(HERE / "README.md", "train_step_other", train_step(json.loads(other.read_text())))
    markdown.fill(HERE / "README.md", "gpu_attention", gpu_attention(json.loads((HERE / "results" / "h200.json").read_text())))
    path = HERE / "results" / "curation.json"
    if path.exists():
        figures = json.loads(path.read_text())
        made = {
            "curation_filters": curation_filters, "curation_speed": curation_speed, "curation_pipeline": curation_pipeline,
            "curation_grown": curation_grown,
        }  # fmt: skip
        for name, make in made.items():
            if (part := name.replace("speed", "filters").removeprefix("curation_")) in figures:
                markdown.fill(HERE / "README.md", name, make(figures[part]))
    path = HERE / "results" / "balance.json"
    if path.exists():
        figures = json.loads(path.read_text())
        markdown.fill(HERE / "README.md", "balance", markdown.table(*balance_counts(figures["counted"])))
        if figures["timed"]:
            markdown.fill(HERE / "README.md", "balance_seconds", markdown.table(*balance_seconds(figures["timed"])))
    markdown.fill(
        HERE / "README.md",
        "strategies",
        markdown.table(*strategies(json.loads((HERE / "results" / "strategies.json").read_text()))),
    )
    path = HERE / "results" / "generation.json"
    if path.exists() and "long" in (found := json.loads(path.read_text())):
        markdown.fill(HERE / "README.md", "long_prompt", long_prompt(found))


if __name__ == "__main__":
    main()
