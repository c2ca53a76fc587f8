"""Does the quality classifier find planted quality in books, and does a model learn more from what it selects?

    python experiments/006_data/quality.py --books='books/*.txt' --workdir=runs/006_quality

Passages of books are clean; as many are made bad: words shuffled, turned to boiler-plate, or mixed with machine noise. The
passages of some books are labelled, and `lcx data curate` scores the others. Then a small byte-level model is trained on all and
on the selection, with equal tokens, and read on books that none of them comes from. Two CPU cores, about eight minutes, two with
--seeds=0; `pip install wordllama` first. Resumes: what is finished is not done again. Writes
quality.json and the tables of README.md beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from lcx.core.console import say
from lcx.data.config import SourceConfig
from lcx.data.curation.classifier import auc
from lcx.data.curation.config import CuratedSource, CurationConfig
from lcx.data.curation.pipeline import curate
from lcx.data.curation.scores import ScoreConfig
from lcx.data.loader import probe
from lcx.model.architecture import build_architecture, build_schemes
from lcx.report import markdown
from lcx.training import monitor
from lcx.training.loading import load_params
from lcx.training.loop import train
from lcx.training.stages import RunConfig, run_config

HERE = Path(__file__).parent
PASSAGE, PER_BOOK, HELD_BOOKS, LABELLED_BOOKS = 3000, 16, 14, 25
LENGTH, STEPS, BATCH = 128, 250, 16
TRAINED = ("corpus", "selected")
EMBEDDINGS = (("wordllama", True), ("wordllama", False), ("hashed", True), ("hashed", False))


def shuffled(text: str, rng: random.Random) -> str:
    """Words change places; white space stays where it is."""
    parts = re.split(r"(\s+)", text)
    words = parts[::2]
    rng.shuffle(words)
    parts[::2] = words
    return "".join(parts)


def boilerplate(text: str, rng: random.Random) -> str:
    """A menu of a few of its lines, over and over."""
    lines = [line.strip()[:40] for line in text.splitlines() if line.strip()]
    menu, found = rng.sample(lines, min(6, len(lines))), []
    while sum(map(len, found)) < len(text):
        found.append(" | ".join(rng.sample(menu, min(4, len(menu)))))
    return "\n".join(found)


def noise(text: str, rng: random.Random) -> str:
    """Four characters of ten are any."""
    return "".join(chr(rng.randrange(33, 127)) if rng.random() < 0.4 else char for char in text)


BAD = (shuffled, boilerplate, noise)


def write_corpus(books: Sequence[str], folder: Path) -> None:
    """corpus.jsonl of all passages, labels.jsonl of those of the first books, and heldout.jsonl of the last ones."""
    rng, rows, labels = random.Random(0), [], []
    order = sorted(books)
    rng.shuffle(order)
    number = 0
    for place, path in enumerate(order[:-HELD_BOOKS]):
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        for at in range(20_000, 20_000 + PASSAGE * PER_BOOK, PASSAGE):
            passage = text[at : at + PASSAGE]
            if len(passage) < PASSAGE:
                break
            bad = BAD[number % len(BAD)]
            number += 1
            for kind, content in (("clean", passage), (bad.__name__, bad(passage, rng))):
                rows.append({"text": content, "kind": kind})
                if place < LABELLED_BOOKS:
                    labels.append({"text": content, "label": int(kind == "clean")})
    rng.shuffle(rows)
    held = [{"text": Path(path).read_text(encoding="utf-8", errors="replace")[20_000:220_000]} for path in order[-HELD_BOOKS:]]
    for name, content in (("corpus", rows), ("labels", labels), ("heldout", held)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def classify(workdir: Path, kind: str, trigrams: bool) -> dict:
    """Figures of the classifier on held-out labels, and on the passages that have none, by kind of what was made of them."""
    settings = {"labels": {"file": {"path": f"{workdir}/labels.jsonl"}}, "embedding": {"kind": kind}, "trigrams": trigrams}
    source = SourceConfig("jsonl", f"{workdir}/corpus.jsonl")
    config = CurationConfig(
        {"passages": CuratedSource(filters=(), source=source)},
        minhash=None,
        scores={"quality": ScoreConfig("quality", settings)},
    )
    start = time.perf_counter()
    out = workdir / f"{kind}-{trigrams}"
    learned = curate(config, out, workers=1)["scores"]["quality"]
    labelled = {json.loads(line)["text"] for line in (workdir / "labels.jsonl").read_text().splitlines()}
    kinds = {json.loads(line)["text"]: json.loads(line)["kind"] for line in (workdir / "corpus.jsonl").read_text().splitlines()}
    rows = [json.loads(line) for path in sorted((out / "passages").glob("*.jsonl")) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["text"] not in labelled]
    p = np.array([row["scores"]["quality"] for row in rows])
    of = np.array([kinds[row["text"]] for row in rows])
    unseen = {
        bad.__name__: round(auc(p[mask], of[mask] == "clean"), 4)
        for bad in BAD
        if (mask := np.isin(of, ["clean", bad.__name__])).any()
    }
    return {
        "embedding": kind,
        "trigrams": trigrams,
        "labels": learned["labels"]["used"],
        "held_out": learned["rounds"][-1],
        "unseen": {"documents": len(rows), "auc": round(auc(p, of == "clean"), 4), "by_kind": unseen},
        "seconds": round(time.perf_counter() - start, 1),
    }


def select(workdir: Path) -> None:
    """The passages with P ≥ 0.5 by the first of the classifiers with trigrams, for training; how many of them are clean."""
    folder = next(path for kind, _ in EMBEDDINGS if (path := workdir / f"{kind}-True").exists())
    rows = [json.loads(line) for path in sorted((folder / "passages").glob("*.jsonl")) for line in path.read_text().splitlines()]
    (workdir / "selected.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["scores"]["quality"] >= 0.5))


def config(seed: int, data: Path) -> RunConfig:
    """A byte-level model of 0.1M parameters on the passages of a file."""
    return run_config(
        {
            "model": {
                "model_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "mlp_dim": 192,
            },
            "positions": {"default": {"name": "rope", "theta": 100.0}},
            "data": {"parts": {"text": {"source": {"kind": "jsonl", "path": str(data)}}}},
            "stages": [{"name": "base", "seq_len": LENGTH, "steps": STEPS, "batch_size": BATCH}],
            "optim": {"lr": 4e-3, "b2": 0.98, "weight_decay": 0.01, "warmup_steps": 20, "schedule": "linear"},
            "checkpoint": {"every": None},
            "metrics": {"writers": "jsonl"},
            "seed": seed,
        }
    )  # fmt: skip


def held_out_loss(place: Path, workdir: Path) -> float:
    """Nats a byte on the books that were held out."""
    loaded = load_params(place)
    arch, buffers = build_architecture(
        loaded.run.model, loaded.run.execution, build_schemes(loaded.run.model, loaded.schemes), LENGTH
    )
    data = dataclasses.replace(config(0, workdir / "heldout.jsonl").data, heldout_fraction=0.99)
    batch = probe(data, LENGTH, 512, 0)
    return float(monitor.read_probe(monitor.probe_sums(loaded.params, buffers, arch, batch)).text_loss)


def findings(found: dict) -> str:
    """The tables of the README."""
    classified = [
        [
            one["embedding"],
            "yes" if one["trigrams"] else "no",
            *(f"{one['held_out'][key]:.3f}" for key in ("auc", "precision", "recall")),
            f"{one['unseen']['auc']:.3f}",
            *(f"{one['unseen']['by_kind'][bad.__name__]:.3f}" for bad in BAD),
        ]
        for one in found["classifiers"]
    ]
    head = ["embedding", "trigrams", "AUC", "precision", "recall", "AUC, no label", *(bad.__name__ for bad in BAD)]
    parts = [markdown.table(head, classified)]
    if found["training"]:
        seeds = sorted({one["seed"] for one in found["training"]})
        rows = [[name, *(f"{one['loss']:.4f}" for one in found["training"] if one["data"] == name)] for name in TRAINED]
        parts.append(markdown.table(["trained on", *(f"seed {seed}" for seed in seeds)], rows))
    return "\n\n".join(parts)


def main() -> None:
    """Do what is missing, keep it, show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", required=True, help="pattern of plain-text books, such as 'books/*.txt'")
    parser.add_argument("--workdir", type=Path, default=Path("runs/006_quality"))
    parser.add_argument("--seeds", type=int, default=3, help="models of each kind to train (0: none)")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    path = HERE / "quality.json"
    if not (args.workdir / "heldout.jsonl").exists():
        write_corpus(glob.glob(args.books), args.workdir)
    found = {"classifiers": [classify(args.workdir, *one) for one in EMBEDDINGS], "training": []}
    select(args.workdir)
    for seed in range(args.seeds):
        for name in TRAINED:
            place = args.workdir / f"{name}-{seed}"
            kept = place / "loss.json"
            if not kept.exists():
                start = time.perf_counter()
                train(config(seed, args.workdir / f"{name}.jsonl"), place, jax.devices()[:1])
                loss = round(held_out_loss(place, args.workdir), 5)
                kept.write_text(
                    json.dumps({"seed": seed, "data": name, "loss": loss, "seconds": round(time.perf_counter() - start)})
                )
            found["training"].append(json.loads(kept.read_text()))
            say(f"{name}, seed {seed}: {found['training'][-1]}")
    path.write_text(json.dumps(found, indent=1) + "\n")
    markdown.fill(HERE / "README.md", "quality", findings(found))
    print(findings(found))


if __name__ == "__main__":
    main()
