"""Does an extension on data that needs its length beat one on short documents joined together?

    python experiments/006_data/extension.py --books='books/*.txt' --workdir=runs/006_extension

A byte-level model of 0.4M parameters that finds needles and follows a renamed variable at 256 bytes is extended to 2,048, with
equal tokens and the same theta, on text that is whole books or passages of 256 bytes, and on questions whose documents have 2,048
bytes or 256: four mixtures, three seeds each. All that is short is shuffled and joined into rows of 2,048. Two CPU cores, about
three quarters of an hour. Resumes: what is trained and measured is kept. Writes extension.json and the table of README.md beside
this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_collections
import numpy as np

from lcx.core.console import say
from lcx.data.config import SourceConfig
from lcx.data.sources import sources, token_weights
from lcx.data.sources.prepare import prepare
from lcx.data.sources.prepared import open_prepared
from lcx.data.tasks.base import TaskConfig
from lcx.data.tasks.table import make_task
from lcx.data.tokenizers import tokenizers
from lcx.evals.base import Item
from lcx.evals.config import EvalConfig
from lcx.evals.results import perplexity
from lcx.positions.theta import critical_base
from lcx.recipes.models import initial_weights
from lcx.recipes.recipe import backend_of, defaults, evaluate_loaded, part, recipe
from lcx.report import markdown
from lcx.training.loading import Loaded, load_params
from lcx.training.loop import train

HERE = Path(__file__).parent
SHORT, LONG, THETA = 256, 2048, 350.0
TRAINED_BOOKS, HELD_BOOKS = 30, 14
STEPS, BATCH = 60, 4
TASKS = {"needles": "multikey", "tracking": "variable_tracking"}
QUERIES = {"needles": 4, "tracking": 3}
"""Needles or chains, each of them asked for, per 256 bytes."""
SHARES = {"text": 0.4, "needles": 0.3, "tracking": 0.3}
ANSWER_WEIGHT, HOPS = 10.0, 1
LENGTHS = (SHORT, LONG)
MIXTURES = {
    "whole books, long questions": (LONG, LONG),
    "whole books, short questions": (LONG, SHORT),
    "passages, long questions": (SHORT, LONG),
    "passages, short questions": (SHORT, SHORT),
}
"""Length of the text's documents (`LONG`: as they are) and of the questions'."""


def settings(name: str) -> TaskConfig:
    """A task with as many questions a byte at every length."""
    count, rate = QUERIES[name], QUERIES[name] * 1024 / SHORT
    return TaskConfig(count, count, rate, rate, answer_weight=ANSWER_WEIGHT, hops=HOPS)


def write_texts(books: Sequence[str], folder: Path) -> None:
    """The books to train on whole and in passages, and those to read afterwards, in ASCII."""
    order = sorted(books)
    random.Random(0).shuffle(order)
    texts = [Path(path).read_bytes().decode("ascii", "ignore") for path in order]
    trained = [text[5_000:] for text in texts[: min(TRAINED_BOOKS, len(texts) - HELD_BOOKS)]]
    passages = [text[at : at + SHORT] for text in trained for at in range(0, len(text) - SHORT + 1, SHORT)]
    held = [text[20_000:220_000] for text in texts[-HELD_BOOKS:]]
    for name, content in ((f"text_{LONG}", trained), (f"text_{SHORT}", passages), ("heldout", held)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in content))


def text_source(folder: Path, length: int) -> dict:
    """Documents of the text part."""
    return {"kind": "jsonl", "path": str(folder / f"text_{length}.jsonl")}


def whole(path: Path) -> sources.Subset:
    """All documents of a file, to write questions into."""
    return sources.split(sources.load(SourceConfig("jsonl", str(path)), tokenizers.load("bytes")), 0.0, "train")


def write_questions(folder: Path, name: str, length: int) -> None:
    """As many documents of a task as a run reads, and some more, prepared with the loss weights that the task gives them."""
    out = folder / f"{name}_{length}"
    if (out / token_weights.META).exists():
        return
    tokenizer = tokenizers.load("bytes")
    task, haystack = make_task(TASKS[name], settings(name), tokenizer), whole(folder / f"text_{LONG}.jsonl")
    count = int(1.1 * STEPS * BATCH * LONG * SHARES[name]) // length
    samples = task.sample(np.random.default_rng([length, len(name)]), length - 1, haystack, count)
    file = folder / f"{name}_{length}.jsonl"
    file.write_text("".join(json.dumps({"text": tokenizer.decode(row)}) + "\n" for row in samples.tokens))
    prepare(SourceConfig("jsonl", str(file)), "bytes", out)
    data = open_prepared(SourceConfig("array_record", str(out)), tokenizer, weighted=False)
    for i in (0, count - 1):
        kept = data.gather(np.array([i]), np.array([0]), np.array([length]))
        assert np.array_equal(kept, samples.tokens[i]), f"{out}: document {i} is not the one that was written"
    token_weights.write(out, {"kind": "task"}, data.shards, lambda document: samples.loss_weights[document])


def model_config(stages: dict) -> ml_collections.ConfigDict:
    """Four layers, so that two of them look at the whole context: one to find each end of a renaming."""
    config = defaults(
        stages, model_dim=64, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32, mlp_dim=256,
        pattern=("local", "global"), window=16,
    )  # fmt: skip
    config.positions = {"local": {"name": "t5", "focus": 8.0}, "global": {"name": "rope", "theta": THETA}}
    config.optim.b2 = 0.98
    config.optim.weight_decay = 0.01
    config.checkpoint.every = None
    config.metrics.writers = "jsonl"
    config.monitor.enabled = False
    return config


def base_config(folder: Path) -> ml_collections.ConfigDict:
    """From scratch to 256 bytes, where both tasks are learned."""

    def stage(needles: int, chains: int, **values) -> dict:
        counts = {"needles": needles, "tracking": chains}
        return {**values, "parts": {name: {"task": {"needles": n, "queries": n}} for name, n in counts.items()}}

    constant = {"lr": 2e-3, "schedule": "constant"}
    theta = {"positions": {"global": THETA}, "keep_optimizer_state": True}
    config = model_config(
        {
            "base_64": stage(3, 1, seq_len=64, batch_size=64, steps=400, optim={**constant, "lr": 3e-3, "warmup_steps": 40}),
            "base_128": stage(6, 3, seq_len=128, batch_size=32, steps=300, optim=constant, **theta),
            "base_256": stage(8, 5, seq_len=SHORT, batch_size=16, steps=400, optim={"lr": 2e-3}, **theta),
        }
    )
    source = text_source(folder, LONG)
    asked = {"answer_weight": ANSWER_WEIGHT, "hops": HOPS}
    config.data.parts = {
        "text": part(weight=0.2, source=source),
        **{name: part(kind=kind, weight=0.4, source=source, task=asked) for name, kind in TASKS.items()},
    }
    return config


def extension_config(folder: Path, seed: int, text: int, questions: int) -> ml_collections.ConfigDict:
    """One stage at 2,048 bytes, at its critical base."""
    theta = critical_base(THETA, SHORT, LONG)
    stage = {"seq_len": LONG, "batch_size": BATCH, "steps": STEPS, "positions": {"global": theta}, "optim": {"lr": 1e-3}}
    config = model_config({"extend": stage})
    config.seed = seed
    config.init_from = str(folder / "base")
    asked = {name: {"kind": "array_record", "path": str(folder / f"{name}_{questions}")} for name in TASKS}
    config.data.parts = {
        name: part(weight=SHARES[name], source=source) for name, source in {"text": text_source(folder, text), **asked}.items()
    }
    return config


def measure(loaded: Loaded, folder: Path) -> dict[str, dict[int, float]]:
    """Needles and chains found and perplexity a byte, by length, in and on books that were not trained on."""
    source = {"kind": "jsonl", "path": str(folder / "heldout.jsonl")}
    config = model_config({"unused": {"seq_len": LONG, "steps": 1, "batch_size": 1}})
    config.data.heldout_fraction = 0.99
    config.data.parts = {
        "text": part(source=source),
        "needles": part(kind=TASKS["needles"], source=source, task=dataclasses.asdict(settings("needles"))),
    }
    loaded = dataclasses.replace(loaded, run=dataclasses.replace(loaded.run, data=recipe(config).run.data))
    evals = EvalConfig(("needles", "perplexity"), LENGTHS, needle_items=20, perplexity_tokens=1 << 16)
    found = evaluate_loaded(loaded, evals, "extension", None)
    return {
        "needles": {n: found.value(task="needles", length=n) for n in LENGTHS},
        "tracking": {n: chains_followed(loaded, folder, n) for n in LENGTHS},
        "perplexity": {n: perplexity(found.value(metric="nll", length=n)) for n in LENGTHS},
    }


def chains_followed(loaded: Loaded, folder: Path, length: int) -> float:
    """The share of 100 rows whose last question gets the right value."""
    tokenizer = tokenizers.load("bytes")
    task, haystack = make_task(TASKS["tracking"], settings("tracking"), tokenizer), whole(folder / "heldout.jsonl")
    samples = task.sample(np.random.default_rng([1, length]), length - 1, haystack, 100)
    start, end = samples.answer_start, samples.answer_start + samples.answer_length
    scores = backend_of(loaded, length).loglikelihood([Item(row[:start], row[start:end]) for row in samples.tokens])
    return float(np.mean([np.all(one.correct) for one in scores]))


def run(folder: Path, seeds: int) -> Iterator[dict]:
    """What is measured of the base model, then of every mixture and seed."""
    if not (folder / "base.json").exists():
        train(recipe(base_config(folder)).run, folder / "base")
    yield {"mixture": "before", "seed": None, **_kept(folder / "base.json", folder / "base", folder)}
    for seed, (name, (text, questions)) in itertools.product(range(seeds), MIXTURES.items()):
        out = folder / f"{text}-{questions}-{seed}"
        if not out.with_suffix(".json").exists():
            say(f"{name}, seed {seed}")
            chosen = recipe(extension_config(folder, seed, text, questions)).run
            train(chosen, out, given=initial_weights(chosen.init_from))
        yield {"mixture": name, "seed": seed, **_kept(out.with_suffix(".json"), out, folder)}


def _kept(file: Path, workdir: Path, folder: Path) -> dict:
    if not file.exists():
        file.write_text(json.dumps(measure(load_params(workdir), folder)))
    return json.loads(file.read_text())


def table(rows: Sequence[dict]) -> str:
    """Means over the seeds at 256 and 2,048 bytes, with the lowest and highest seed at 2,048."""

    def cell(found: list[dict], key: str, length: int, form: str, scale: float) -> str:
        values = [scale * row[key][str(length)] for row in found]
        spread = f" ({min(values):{form}}–{max(values):{form}})" if length == LONG and len(values) > 1 else ""
        return f"{np.mean(values):{form}}{spread}"

    kinds = (("needles", ".0f", 100.0), ("tracking", ".0f", 100.0), ("perplexity", ".3f", 1.0))
    names = {"needles": "needles, %", "tracking": "chains, %", "perplexity": "perplexity"}
    head = ["extended on", *(f"{names[key]} at {at:,}" for key, _, _ in kinds for at in (SHORT, LONG))]
    lines = []
    for name in ("before", *MIXTURES):
        found = [row for row in rows if row["mixture"] == name]
        lines.append([name, *(cell(found, key, at, form, scale) for key, form, scale in kinds for at in (SHORT, LONG))])
    return markdown.table(head, lines)


def main() -> None:
    """Do what is missing, keep it, show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", required=True, help="pattern of plain-text books, such as 'books/*.txt'")
    parser.add_argument("--workdir", type=Path, default=Path("runs/006_extension"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    if not (args.workdir / "heldout.jsonl").exists():
        write_texts(glob.glob(args.books), args.workdir)
    for name, length in itertools.product(TASKS, (SHORT, LONG)):
        write_questions(args.workdir, name, length)
    rows = list(run(args.workdir, args.seeds))
    of = {"steps": STEPS, "batch": BATCH, "lengths": LENGTHS, "shares": SHARES, "books": [TRAINED_BOOKS, HELD_BOOKS]}
    (HERE / "extension.json").write_text(json.dumps({"settings": of, "rows": rows}, indent=1) + "\n")
    markdown.fill(HERE / "README.md", "extension", table(rows))


if __name__ == "__main__":
    main()
