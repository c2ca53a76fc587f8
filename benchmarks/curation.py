"""Filters of documents: lcx against datatrove's, the same thresholds on the same documents, and where their decisions differ.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install datatrove spacy nltk
    python benchmarks/curation.py --books='texts/**/*.txt' --peer_python=/tmp/peer/bin/python

Documents are stretches of books of 1 to 32 kB and modules of Python's standard library. Each side is a process of its own on one
core, and they take turns (A B A B ...). A turn judges all documents by all filters, each document until one drops it; ratios are
medians over the pairs of turns. Decisions are compared for all filters together and for each by itself, and once more with
datatrove given lcx's idea of a word and of the end of a line. Then lcx alone curates all books and the standard library (filters,
duplicates, files written) with one worker and with two, in turns. `--gigabytes=10` curates as much text instead, which is written
first: the stretches of the books, over and over, with one letter of 30 replaced anew, so that none is a near-duplicate of another.
"""

from __future__ import annotations

import collections
import glob
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tables
from absl import app, flags
from process import Process

HERE = Path(__file__).resolve().parent
NAMES = ("gopher_quality", "gopher_repetition", "fineweb", "c4")

FLAGS = flags.FLAGS
flags.DEFINE_string("out", str(HERE / "results" / "curation.json"), "Where the figures are written.")
flags.DEFINE_string("books", None, "Pattern of text files.", required=True)
flags.DEFINE_string("peer_python", None, "The interpreter that datatrove is installed for (None: lcx alone).")
flags.DEFINE_float("megabytes", 16, "Text to judge.", lower_bound=0.1)
flags.DEFINE_integer("pairs", 2, "Turns of each side.", lower_bound=1)
flags.DEFINE_float("gigabytes", None, "Curate books grown to this size alone, and keep the figures by size.", lower_bound=0.01)
flags.DEFINE_multi_integer("workers", [1, 2], "Numbers of workers to curate with.", lower_bound=1)
flags.DEFINE_string("differences", None, "A JSONL file that gets the documents on which the decisions differ.")


def documents(pattern: str, size: float) -> list[str]:
    """Stretches of books and modules in random order, of `size` bytes in all."""
    rng = np.random.default_rng(0)
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    modules = [path for path in modules if not {"site-packages", "test", "tests", "__pycache__"} & set(path.parts)]
    found = [path.read_text(errors="ignore") for path in modules]
    for path in sorted(glob.glob(os.path.expanduser(pattern), recursive=True)):
        found += _stretches(Path(path).read_text(errors="ignore"), rng)
    rng.shuffle(order := np.arange(len(found)))
    chosen: list[str] = []
    for i in order:
        if size <= 0:
            break
        if found[i].strip():
            chosen.append(found[i])
            size -= len(found[i].encode())
    return chosen


def _stretches(text: str, rng: np.random.Generator) -> Iterator[str]:
    """Whole paragraphs, of sizes drawn log-uniformly."""
    held, size, enough = [], 0, 0.0
    for paragraph in text.split("\n\n"):
        if not held:
            enough = 1000 * 2 ** rng.uniform(0, 5)
        held.append(paragraph)
        size += len(paragraph) + 2
        if size >= enough:
            yield "\n\n".join(held)
            held, size = [], 0
    if held:
        yield "\n\n".join(held)


def main(_: list[str]) -> None:
    """Judge in turns, compare, print and keep the tables."""
    out = Path(FLAGS.out)
    found = json.loads(out.read_text()) if out.exists() else {}
    if FLAGS.gigabytes is not None:
        with tempfile.TemporaryDirectory() as folder:
            grow(documents(FLAGS.books, float("inf")), Path(folder, "grown.jsonl"), FLAGS.gigabytes * 1e9)
            found.setdefault("grown", {})[f"{FLAGS.gigabytes:g}"] = pipeline({"grown": f"{folder}/grown.jsonl"}, 1)
        print(tables.curation_grown(found["grown"]))
    else:
        if FLAGS.peer_python:
            found["filters"] = filters(documents(FLAGS.books, FLAGS.megabytes * 1e6))
            print(tables.curation_filters(found["filters"]))
        found["pipeline"] = pipeline({"books": FLAGS.books}, FLAGS.pairs)
        print(tables.curation_pipeline(found["pipeline"]))
    out.write_text(json.dumps(found, indent=1) + "\n")
    tables.main()


def filters(texts: list[str]) -> dict[str, Any]:
    """Figures of both sides on the documents."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "documents.jsonl")
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        case = {"documents": str(path)}
        sides = {"lcx": Process("lcx", "filters_lcx", case), "datatrove": peer(case)}
        found = measure(sides, texts)
        sides["datatrove"].finish()
        sides["datatrove"] = peer({**case, "same_words": True})
        found["agreement_same_words"] = compare(sides, texts)
        for side in sides.values():
            side.finish()
    return found


def grow(texts: list[str], path: Path, size: float) -> None:
    """Write `size` bytes of rows: the texts again and again, with other letters in random places each time."""
    rng, written = np.random.default_rng(0), 0
    whole = np.frombuffer("".join(texts).encode("ascii", "replace"), np.uint8)
    ends = np.cumsum([len(text) for text in texts]).tolist()
    letters = np.flatnonzero((whole | 32) - ord("a") < 26)
    with path.open("w") as file:
        while True:
            copy = whole.copy()
            places = rng.choice(letters, len(letters) // 30)
            copy[places] = rng.integers(ord("a"), ord("z") + 1, len(places), np.uint8)
            content = copy.tobytes().decode()
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                file.write(json.dumps({"text": content[start:end]}) + "\n")
                written += end - start
                if written >= size:
                    return


def pipeline(source: dict[str, str], turns: int) -> dict[str, Any]:
    """Seconds and memory of whole curations of a source, by number of workers."""
    found: dict[str, list[dict[str, Any]]] = {str(workers): [] for workers in FLAGS.workers}
    load = os.getloadavg()[0]
    for _ in range(turns):
        for workers, kept in found.items():
            case = json.dumps({**source, "workers": int(workers)})
            command = [sys.executable, str(HERE / "sides" / "curate_lcx.py"), case]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            kept.append(json.loads(out.splitlines()[-1]))
    return {"machine": machine(load), "turns": found}


def machine(load: float) -> dict[str, Any]:
    """Where it ran, and how many processes waited for a processor when it began."""
    return {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load_before": load}


def peer(case: dict[str, Any]) -> Process:
    """datatrove's side."""
    return Process("datatrove", "filters_datatrove", case, python=FLAGS.peer_python, own_packages=False)


def measure(sides: dict[str, Process], texts: list[str]) -> dict[str, Any]:
    """Speeds of both sides, and what became of the documents."""
    load, turns = os.getloadavg()[0], {name: [] for name in sides}
    for _ in range(FLAGS.pairs):
        for name, side in sides.items():
            turn = side.ask(" ".join(NAMES))
            turns[name].append({"wall": turn["wall"], "cpu": turn["cpu"]})
    size = sum(len(text.encode()) for text in texts)
    speed = {}
    for clock in ("wall", "cpu"):
        seconds = {name: [turn[clock] for turn in found] for name, found in turns.items()}
        pairs = zip(seconds["lcx"], seconds["datatrove"], strict=True)
        speed[clock] = {
            **{name: size / 1e6 / statistics.median(values) for name, values in seconds.items()},
            "ratio": statistics.median(theirs / ours for ours, theirs in pairs),
        }
    return {
        "documents": len(texts),
        "bytes": size,
        "machine": machine(load),
        "versions": {key: value for side in sides.values() for key, value in side.facts["versions"].items()},
        "megabytes_per_second": speed,
        "turns": turns,
        "agreement": compare(sides, texts),
    }


def compare(sides: dict[str, Process], texts: list[str]) -> dict[str, Any]:
    """How often the decisions are the same, for all filters together and for each by itself."""
    found = {}
    for which in (NAMES, *((name,) for name in NAMES)):
        decided = {side: process.ask(" ".join(which))["reasons"] for side, process in sides.items()}
        found["all" if which == NAMES else which[0]] = agree(decided)
        if FLAGS.differences:
            with open(FLAGS.differences, "a") as file:
                for row in zip(texts, decided["lcx"], decided["datatrove"], strict=True):
                    if (row[1] is None) != (row[2] is None):
                        file.write(json.dumps(dict(zip(("text", *sides), row, strict=True))) + "\n")
    return found


def agree(decided: dict[str, list[str | None]]) -> dict[str, Any]:
    """How many documents both sides keep or both drop, and the pairs of reasons where they differ."""
    pairs = list(zip(decided["lcx"], decided["datatrove"], strict=True))
    different = collections.Counter(
        f"lcx {ours or 'keeps'}, datatrove {theirs or 'keeps'}" for ours, theirs in pairs if (ours is None) != (theirs is None)
    )
    return {
        "same": sum((ours is None) == (theirs is None) for ours, theirs in pairs),
        "kept": {name: sum(reason is None for reason in reasons) for name, reasons in decided.items()},
        "different": dict(different.most_common()),
    }


if __name__ == "__main__":
    app.run(main)
