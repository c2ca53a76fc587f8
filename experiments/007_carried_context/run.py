"""A context extension carried to a model that was never extended, and the same extension trained as adapters.

    python experiments/007_carried_context/run.py --books='books/*.txt' --workdir=runs/007_carried_context

The tiny Llama of experiment 004, extended from 256 to 4,096 bytes, and a sibling: its base fine-tuned at 256 bytes on conversations
from books, a domain and a format that neither has seen. What the extension added is extracted as differences and as adapters of
several ranks, and laid over the sibling. Then the base is extended again with equal tokens in full, by adapters (LoRA), by adapters
with embeddings and norms trained, and so in shifted groups (LongLoRA), with three seeds. Needs torch, transformers and books in
plain text.
Two CPU cores, about an hour. Resumes: what is finished is kept. Writes results.json, the picture and the tables of README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import matplotlib
import ml_collections
import numpy as np

from lcx.cli.parse import module
from lcx.core import configs
from lcx.core.console import say
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.data.config import DataConfig
from lcx.evals.config import EvalConfig
from lcx.evals.results import perplexity
from lcx.interop.hf_config import read_file
from lcx.merging.apply import Application
from lcx.merging.extract import Extraction
from lcx.positions.theta import critical_base
from lcx.recipes import models
from lcx.recipes.recipe import evaluate_loaded, part, recipe
from lcx.report import markdown, style
from lcx.training.builder import StageBuilder
from lcx.training.loop import train
from lcx.training.memory import bytes_beside_arguments
from lcx.training.metrics import read
from lcx.training.stages import RunConfig

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PARTS = ("carried", "trained", "timed")
LENGTHS = (256, 1024, 4096)
RANKS = (4, 8, 16, 32, 64)
ENERGIES = (0.9, 0.99)
TURN = 120
"""Bytes of a turn of a conversation."""
TURNS = 3
"""Short runs of each method from which the time of a step is taken."""

WIDE = {"rank": 16, "alpha": 32.0, "targets": ("attention", "mlp"), "train": ("embed", "norm")}
METHODS: dict[str, tuple[dict, float, bool]] = {
    "full": ({}, 1e-3, False),
    "lora": ({"rank": 16, "alpha": 32.0, "targets": ("attention", "mlp")}, 3e-3, False),
    "lora + embeddings, norms": (WIDE, 3e-3, False),
    "the same, shifted attention (LongLoRA)": (WIDE, 3e-3, True),
}
"""Name -> settings of the adapters, a learning rate, and whether attention stays within shifted groups of a quarter of the row."""


def write_chats(books: Sequence[str], folder: Path) -> None:
    """Conversations whose turns are neighbouring passages of books, to train on and to read afterwards."""
    order = sorted(books)
    random.Random(0).shuffle(order)
    for name, chosen in (("train", order[:30]), ("heldout", order[-14:])):
        lines = []
        for path in chosen:
            text = " ".join(Path(path).read_bytes().decode("ascii", "ignore").split())[20_000:220_000]
            turns = [text[at : at + TURN] for at in range(0, len(text), TURN)]
            for i in range(0, len(turns) - 7, 8):
                marks = ("<|user|>", "<|assistant|>")
                lines.append("\n".join(f"{marks[k % 2]}\n{turn}" for k, turn in enumerate(turns[i : i + 8])))
        (folder / f"chats_{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def sibling(four: ModuleType, source: Path, folder: Path) -> ml_collections.ConfigDict:
    """The base fine-tuned at its own length on conversations, with a few needles, as a model that retrieves would keep them."""
    config = four.base(source)
    config.stages = ml_collections.ConfigDict(
        {"chats": {"seq_len": 256, "batch_size": 16, "steps": 400, "optim": {"lr": 1e-3, "warmup_steps": 20}}}
    )
    config.stage_order = ("chats",)
    config.data.parts = four.parts(needles=8, queries=8)
    config.data.parts.code.weight, config.data.parts.needles.weight = 0.7, 0.3
    config.data.parts.code.source.kind, config.data.parts.code.source.path = "jsonl", str(folder / "chats_train.jsonl")
    return config


def measure(model: Path, folder: Path, needles: int = 20) -> dict[str, dict[str, float]]:
    """Needles in code and perplexity of conversations and of code, by length; of a run or of a Hugging Face folder."""
    loaded = models.load(model)
    found: dict[str, dict[str, float]] = {}
    code = part(kind="text", weight=0.2)
    chats = part(kind="text", weight=0.2, source={"kind": "jsonl", "path": str(folder / "chats_heldout.jsonl")})
    task = {"needles": 4, "queries": 4, "needles_per_1024": 8.0, "queries_per_1024": 8.0}
    for name, text, fraction in (("code", code, 0.1), ("chats", chats, 0.99)):
        config = ml_collections.ConfigDict({"heldout_fraction": fraction, "tokenizer": "bytes+bos"})
        config.parts = {"text": text, "needles": part(kind="multikey", weight=0.8, task=task)}
        data = dataclasses.replace(loaded.run, data=configs.build(DataConfig, config.to_dict(), "data"))
        tasks = ("needles", "perplexity") if name == "code" else ("perplexity",)
        evals = EvalConfig(tasks, LENGTHS, needle_items=needles, perplexity_tokens=1 << 15)
        result = evaluate_loaded(dataclasses.replace(loaded, run=data), evals, name, None)
        found[name] = {str(n): perplexity(result.value(metric="nll", length=n)) for n in LENGTHS}
        if name == "code":
            found["needles"] = {str(n): result.value(task="needles", length=n) for n in LENGTHS}
    return found


def kept(file: Path, make: Callable[[], dict]) -> dict:
    """What `make` gives, computed once."""
    if not file.exists():
        file.write_text(json.dumps(make()))
    return json.loads(file.read_text())


def carried(folder: Path) -> list[dict]:
    """The models to compare, then the sibling with the extension laid over it in each form."""
    rows = []
    for name in ("hf_base", "hf_extended", "hf_sibling"):
        found = kept(folder / f"{name}.json", lambda name=name: measure(folder / name, folder))
        rows.append({"model": name.removeprefix("hf_"), "form": None, "energy": None, "numbers": None, **found})
    # The sibling as it is, but for the theta of the extension: what the settings alone do.
    theta = folder / "sibling_theta"
    if not theta.exists():
        Application(str(folder / "full"), str(folder / "hf_sibling"), weight=0.0, rotary="delta").write(theta)
    found = kept(folder / "sibling_theta.json", lambda: measure(theta, folder))
    rows.append({"model": "sibling", "form": "theta alone", "energy": None, "numbers": 0, **found})
    for form, delta in [("full difference", "full"), ("sparse, 10%", "sparse"), *adapters()]:
        out = folder / f"sibling_{delta}"
        if not out.exists():
            Application(str(folder / delta), str(folder / "hf_sibling")).write(out)
        found = kept(folder / f"{out.name}.json", lambda out=out: measure(out, folder))
        rows.append({"model": "sibling", "form": form, **size_of(folder / delta), **found})
    return rows


def adapters() -> list[tuple[str, str]]:
    """Form and folder of every adapter."""
    return [(f"rank {rank}", f"rank_{rank}") for rank in RANKS] + [(f"energy {share:.0%}", f"energy_{share}") for share in ENERGIES]


def extract(folder: Path) -> None:
    """What the extension added to the base, in every form."""
    extraction = Extraction(str(folder / "hf_base"), str(folder / "hf_extended"))
    for _, name in [("", "full"), ("", "sparse"), *adapters()]:
        kind, _, value = name.partition("_")
        if (folder / name).exists():
            continue
        if kind == "full":
            extraction.full(folder / name)
        elif kind == "sparse":
            extraction.sparse(folder / name, 0.1)
        else:
            rank, energy = (int(value), None) if kind == "rank" else (None, float(value))
            extraction.adapter(folder / name, rank, energy)


def size_of(delta: Path) -> dict:
    """The kept share of the matrices' energy, weighted by module, and how many numbers are stored."""
    file = delta / "extraction.json"
    stored = sum(path.stat().st_size for path in delta.glob("*.safetensors")) // 4
    if not file.exists():
        return {"energy": None, "numbers": stored}
    rows = json.loads(file.read_text())
    return {"energy": float(np.mean([row["energy"] for row in rows])), "numbers": stored}


def extended(four: ModuleType, folder: Path, method: str, seed: int) -> ml_collections.ConfigDict:
    """One stage from 256 to 4,096 bytes at the critical base, the same rows for every method."""
    settings, lr, shifted = METHODS[method]
    source = folder / "hf_base"
    config = four.base(source)
    config.init_from = str(source)
    theta = critical_base(read_file(source).schemes["global"].theta, 256, 4096)
    stages = {
        f"extend_{length}": {
            "seq_len": length, "batch_size": 8192 // length, "steps": 150, "positions": {"global": theta},
            "optim": {"lr": lr, "warmup_steps": 10}, "shifted_group": length // 4 if shifted else None,
        }
        for length in (1024, 4096)
    }  # fmt: skip
    config.stages = ml_collections.ConfigDict(stages)
    config.stage_order = tuple(stages)
    config.data.parts = four.parts(needles=4, queries=4, needles_per_1024=8.0, queries_per_1024=8.0)
    config.lora.update(settings)
    config.seed, config.monitor.enabled, config.checkpoint.every = seed, False, None
    config.metrics.writers = "jsonl"
    return config


def step_bytes(run: RunConfig) -> int:
    """Memory of the compiled step of a run's last stage: its arguments, results and temporaries, by the compiler's count."""
    builder = StageBuilder(run, (), jax.devices()[:1], models.initial_weights(run.init_from))
    built = builder.build(len(run.stages) - 1)
    program = built.step.compile(built.step.abstract_state(), built.batch(0), built.buffers)
    found: Any = program.memory_analysis()
    return found.argument_size_in_bytes + bytes_beside_arguments(found)


def trained(four: ModuleType, folder: Path, seeds: int) -> list[dict]:
    """Every method and seed: needles, perplexity and size of the checkpoint."""
    rows = []
    for seed in range(seeds):
        for method in METHODS:
            out = folder / f"method_{list(METHODS).index(method)}_{seed}"

            def make(out: Path = out, method: str = method, seed: int = seed) -> dict:
                say(f"{method}, seed {seed}")
                run = recipe(extended(four, folder, method, seed)).run
                train(run, out, jax.devices()[:1], given=models.initial_weights(run.init_from))
                sizes = sum(path.stat().st_size for path in (out / "checkpoints").glob("300/**/*") if path.is_file())
                return {"checkpoint": sizes, **measure(out, folder)}

            rows.append({"method": method, "seed": seed, **kept(out.with_suffix(".json"), make)})
    return rows


def timed(four: ModuleType, folder: Path) -> dict[str, dict]:
    """Seconds and memory of a step of 4,096 bytes by method, from short runs in turns. For a machine that does nothing else."""
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    memory: dict[str, int] = {}
    for turn in range(TURNS):
        for i, method in enumerate(METHODS):
            config = extended(four, folder, method, 0)
            for stage in config.stages.values():
                stage.steps = 12
            run, out = recipe(config).run, folder / f"timed_{i}_{turn}"
            train(run, out, jax.devices()[:1], given=models.initial_weights(run.init_from))
            rows = [row for row in read(out / "metrics.jsonl") if row["seq_len"] == 4096]
            seconds[method].append(8192 / float(np.median([row["tokens_per_second"] for row in rows])))
            memory[method] = memory[method] if turn else step_bytes(run)
    return {method: {"step_seconds": seconds[method], "step_bytes": memory[method]} for method in METHODS}


def main() -> None:
    """Train the models, carry the extension, train it as adapters, write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", required=True, help="files of plain text, as a pattern")
    parser.add_argument("--workdir", type=Path, default=Path("runs/007_carried_context"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method of training")
    args = parser.parse_args()
    folder = args.workdir
    folder.mkdir(parents=True, exist_ok=True)
    four = module(str(HERE.parent / "004_hf_round_trip" / "run.py"))
    prepare(four, args.books, folder)
    file = HERE / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    if "carried" in args.parts:
        extract(folder)
        results["carried"] = carried(folder)
    if "trained" in args.parts:
        results["trained"] = trained(four, folder, args.seeds)
    if "timed" in args.parts:
        results["timed"] = timed(four, folder)
    file.write_text(json.dumps(results, indent=1) + "\n")
    fill(results)


def prepare(four: ModuleType, books: str, folder: Path) -> None:
    """Base, extended model and sibling, as runs and as Hugging Face folders."""
    start = time.perf_counter()
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    if not (folder / "chats_train.jsonl").exists():
        write_chats(glob.glob(books), folder)
    if not (folder / "hf_start").exists():
        four.start(folder / "hf_start")
    makers = {
        "base": lambda: four.base(folder / "hf_start"),
        "extended": lambda: four.extended(folder / "hf_base"),
        "sibling": lambda: sibling(four, folder / "hf_base", folder),
    }
    for name, make in makers.items():
        if not (folder / f"hf_{name}").exists():
            chosen = recipe(make())
            train(chosen.run, folder / name, jax.devices()[:1], given=models.initial_weights(chosen.run.init_from))
            models.export_model(folder / name, folder / f"hf_{name}", mesh=one)
    say(f"three models after {time.perf_counter() - start:,.0f} s")


def fill(results: dict) -> None:
    """The tables and the picture."""
    head = ["model", "form", "numbers", "energy", *(f"needles at {n:,}" for n in LENGTHS), "chats at 256", "chats at 4,096"]
    lines = []
    for row in results.get("carried", []):
        needles = [f"{100 * row['needles'][str(n)]:.0f}%" for n in LENGTHS]
        chats = [f"{row['chats'][str(n)]:.3f}" for n in (256, 4096)]
        numbers = "" if row["numbers"] is None else f"{row['numbers']:,}"
        energy = "" if row["energy"] is None else f"{row['energy']:.1%}"
        lines.append([row["model"], row["form"] or "as it is", numbers, energy, *needles, *chats])
    markdown.fill(HERE / "README.md", "carried", markdown.table(head, lines))
    head = ["trained", "needles at 256", "at 1,024", "at 4,096", "code at 4,096", "s a step", "memory, MB", "checkpoint, MB"]
    lines = []
    for method in METHODS:
        rows = [row for row in results.get("trained", []) if row["method"] == method]
        if rows:
            needles = [_spread([100 * row["needles"][str(n)] for row in rows], ".0f") for n in LENGTHS]
            code = _spread([row["code"]["4096"] for row in rows], ".3f")
            step = results.get("timed", {}).get(method)
            costs = ["", ""] if step is None else [_spread(step["step_seconds"], ".2f"), f"{step['step_bytes'] / 1e6:,.0f}"]
            lines.append([method, *needles, code, *costs, f"{np.mean([row['checkpoint'] for row in rows]) / 1e6:.2f}"])
    markdown.fill(HERE / "README.md", "trained", markdown.table(head, lines))
    if results.get("carried"):
        draw(results["carried"])


def _spread(values: Sequence[float], form: str) -> str:
    return f"{np.mean(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def draw(rows: Sequence[dict]) -> None:
    """Needles and the sibling's own perplexity over the rank of what was carried."""
    own = {row["form"]: row for row in rows if row["model"] == "sibling"}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    colors = dict(zip(LENGTHS, style.LINES, strict=False))
    for length, color in colors.items():
        values = [100 * own[f"rank {rank}"]["needles"][str(length)] for rank in RANKS]
        axes[0].plot(RANKS, values, "o-", color=color, label=f"{length:,} bytes")
        axes[0].axhline(100 * own["full difference"]["needles"][str(length)], color=color, linestyle=":", linewidth=1)
    axes[0].set(ylabel="needles found, %", ylim=(-3, 103), title="What is carried")
    axes[0].legend(frameon=False)
    for length in (LENGTHS[0], LENGTHS[-1]):
        color, values = colors[length], [own[f"rank {rank}"]["chats"][str(length)] for rank in RANKS]
        axes[1].plot(RANKS, values, "o-", color=color, label=f"{length:,} bytes")
        axes[1].axhline(own[None]["chats"][str(length)], color=color, linestyle="--", linewidth=1)
        axes[1].axhline(own["full difference"]["chats"][str(length)], color=color, linestyle=":", linewidth=1)
    axes[1].set(ylabel="perplexity of conversations", title="What is kept of the sibling's own")
    axes[1].legend(frameon=False)
    for one in axes:
        one.set(xlabel="rank of the adapter", xscale="log", xticks=RANKS)
        one.set_xticklabels([str(rank) for rank in RANKS])
        one.minorticks_off()
    figure.suptitle("dotted: full difference; dashed: the sibling as it is", fontsize=9)
    figure.savefig(HERE / "carried.png", dpi=120)


if __name__ == "__main__":
    main()
