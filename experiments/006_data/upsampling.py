"""What does each way of length upsampling do to a mix of four sources? Counted from rows, and computed by hand from lengths.

    python experiments/006_data/upsampling.py --books='books/*.txt' --articles=qa/xquad.en.json

One CPU core, half a minute. Writes upsampling.json and its section of README.md beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import tempfile
from pathlib import Path

import numpy as np

from lcx.core.configs import build
from lcx.core.console import say, table
from lcx.data.config import DataConfig
from lcx.data.loader import Corpus, Loader
from lcx.data.report import compare_upsampling, inspect
from lcx.data.synthetic.skills import Size, retrieval
from lcx.report import markdown

HERE = Path(__file__).parent
WEIGHTS = {"books": 0.2, "stdlib": 0.2, "articles": 0.2, "notes": 0.4}
LONG, KEEP, SEQ_LEN, BATCH, SEED = 4096, 0.1, 1024, 20, 0
ROWS, LONGER = 16_000, 8192
WAYS = ("none", "per_source", "global")


def write_sources(folder: Path, articles: str) -> None:
    """XQuAD's articles, one a line, and 4,000 notes of invented facts, one of which in fifty is long."""
    with open(articles) as file:
        found = json.load(file)["data"]
    texts = ["\n\n".join(part["context"] for part in article["paragraphs"]) for article in found]
    (folder / "articles.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rng, notes = random.Random(SEED), []
    for i in range(4000):
        wanted, lines = rng.randint(4096, 6000) if i % 50 == 0 else rng.randint(200, 1500), []
        while sum(map(len, lines)) + len(lines) < wanted:
            lines += retrieval(rng, Size(facts=4, hops=1, lines=1)).facts
        notes.append("\n".join(lines))
    (folder / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in notes))


def mixture(folder: Path, books: str) -> DataConfig:
    """The four sources with their budgets, all thinned alike; every document is in training."""
    sources = {
        "books": {"kind": "text", "path": books},
        "stdlib": {"kind": "stdlib"},
        "articles": {"kind": "jsonl", "path": str(folder / "articles.jsonl")},
        "notes": {"kind": "jsonl", "path": str(folder / "notes.jsonl")},
    }
    parts = {
        name: {"weight": WEIGHTS[name], "source": source, "short_tokens": LONG, "short_keep": KEEP}
        for name, source in sources.items()
    }
    return build(DataConfig, {"parts": parts, "heldout_fraction": 0.0})


def by_hand(lengths: dict[str, np.ndarray], how: str) -> dict[str, dict[str, float]]:
    """Expected shares, and the standard deviation of each that comes from drawing short documents, from lengths alone."""
    share, found = 1.0 if how == "none" else KEEP, {}
    keep = {name: np.where(length < LONG, share, 1.0) for name, length in lengths.items()}
    kept = {name: float((keep[name] * length).sum() / length.sum()) for name, length in lengths.items()}
    budgets = {name: weight * (kept[name] if how == "global" else 1) for name, weight in WEIGHTS.items()}
    read = np.zeros(3)
    for name, length in lengths.items():
        long, short = int((length >= LONG).sum()), int((length < LONG).sum())
        documents = share * short + long
        # Documents are kept independently, and the derivative of long / n in their number n is -long / n^2.
        spread = (short * share * (1 - share)) ** 0.5 * long / documents**2
        tokens = float((keep[name] * length).sum())
        found[name] = {
            "tokens": budgets[name] / sum(budgets.values()),
            "long_documents": long / documents,
            "long_documents_spread": spread,
            "long_tokens": float(length[length >= LONG].sum()) / tokens,
        }
        # Documents are read at the rate share / tokens of their source.
        rate = found[name]["tokens"] / tokens
        read += rate * np.array([documents, long, float(length[length >= LONG].sum())])
    found["all text"] = {"tokens": 1.0, "long_documents": float(read[1] / read[0]), "long_tokens": float(read[2])}
    return found


def measured(config: DataConfig, corpus: Corpus, how: str, seq_len: int = SEQ_LEN) -> dict[str, dict[str, float]]:
    """What `lcx data inspect` counts in the rows of each part, and the documents that its plan packs."""
    loader = Loader(dataclasses.replace(config, length_upsampling=how), seq_len, BATCH, SEED, corpus=corpus)
    report = inspect(loader, ROWS * SEQ_LEN // seq_len, samples=0)
    shares, long_bin, found = report.token_shares(), report.edges.index(LONG), {}
    for name, part, counted in zip(loader.names, loader.parts, report.parts, strict=True):
        found[name] = {
            "tokens": shares[name],
            "long_documents": float((part.source.lengths >= LONG).mean()),
            "long_tokens_of_rows": sum(counted.tokens_by_length[long_bin:]) / counted.tokens,
            "documents": len(part.source.lengths),
            "rows_an_epoch": part.size,
        }
    return found


HEAD = (
    "length upsampling", "source", "budget", "share of tokens", "by hand", "documents", f"of them ≥ {LONG:,}", "by hand",
    f"tokens in those ≥ {LONG:,}", "by hand",
)  # fmt: skip


def rows_of(results: dict) -> list[tuple[object, ...]]:
    """For each way and source what was counted, and what follows from the lengths."""
    rows = []
    for how in WAYS:
        for name, hand in results["by_hand"][how].items():
            counted = results["measured"][how].get(name)
            everything = results["all_text"][how]
            rows.append(
                (
                    how,
                    name,
                    f"{WEIGHTS[name]:.1%}" if counted else "",
                    f"{counted['tokens']:.2%}" if counted else "100%",
                    f"{hand['tokens']:.2%}",
                    f"{counted['documents']:,}" if counted else "",
                    f"{(counted or everything)['long_documents']:.2%}",
                    f"{hand['long_documents']:.2%}",
                    f"{counted['long_tokens_of_rows'] if counted else everything['long_tokens']:.1%}",
                    f"{hand['long_tokens']:.1%}",
                )
            )
    return rows


def checks(results: dict) -> dict:
    """The largest deviations from budgets and from what is computed by hand."""
    found, hand = results["measured"], results["by_hand"]
    budget = max(abs(found["per_source"][name]["tokens"] / weight - 1) for name, weight in WEIGHTS.items())
    mix = max(abs(found["global"][name]["tokens"] / hand["global"][name]["tokens"] - 1) for name in WEIGHTS)
    deviations = [
        abs(found["per_source"][name]["long_documents"] - of["long_documents"]) / of["long_documents_spread"]
        for name, of in hand["per_source"].items()
        if of.get("long_documents_spread", 0) > 0
    ]
    longer = results["in_longer_rows"]["measured"]
    worst = min(WEIGHTS, key=lambda name: longer[name]["tokens"] / WEIGHTS[name])
    before, after = (results["all_text"][how]["long_documents"] for how in ("none", "per_source"))
    shift = ", ".join(f"{name} {found['global'][name]['tokens']:.1%} for {weight:.0%}" for name, weight in WEIGHTS.items())
    return {
        "per_source_worst_budget_error": budget,
        "global_worst_error": mix,
        "long_documents_worst_standard_deviations": max(deviations),
        "sentences": [
            f"Per source, every share of tokens is within {budget:.2%} of its budget, while of the documents read {after:.1%} are "
            f"long instead of {before:.1%}.",
            f"The share of long documents of a source is at most {max(deviations):.1f} standard deviations of the draw from the "
            "one computed by hand.",
            f"Globally the mix shifts: {shift}; each share is within {mix:.2%} of the one computed by hand.",
            f"The last row of an epoch is padded, which costs a source of few rows: with rows of {LONGER:,}, {worst} "
            f"({longer[worst]['rows_an_epoch']} rows) fall {1 - longer[worst]['tokens'] / WEIGHTS[worst]:.1%} short of their "
            "budget.",
        ],
    }


def main() -> None:
    """Measure, compute, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", required=True, help="glob pattern of books, one a text file")
    parser.add_argument("--articles", required=True, help="XQuAD's file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_sources(Path(folder), args.articles)
        config = mixture(Path(folder), args.books)
        corpus = Corpus(config)
    whole = Loader(dataclasses.replace(config, length_upsampling="none"), SEQ_LEN, BATCH, SEED, corpus=corpus)
    lengths = {name: part.source.lengths for name, part in zip(whole.names, whole.parts, strict=True)}
    table_of = {(found.how, found.part): dataclasses.asdict(found) for found in compare_upsampling(whole)}
    results = {
        "weights": WEIGHTS,
        "long_tokens": LONG,
        "short_keep": KEEP,
        "rows": ROWS,
        "sources": {
            name: {"documents": len(length), "tokens": int(length.sum()), "long_documents": int((length >= LONG).sum())}
            for name, length in sorted(lengths.items())
        },
        "measured": {how: measured(config, corpus, how) for how in WAYS},
        "in_longer_rows": {"seq_len": LONGER, "measured": measured(config, corpus, "per_source", LONGER)},
        "by_hand": {how: by_hand(lengths, how) for how in WAYS},
        "all_text": {how: table_of[how, "all text"] for how in WAYS},
    }
    results["checks"] = checks(results)
    (HERE / "upsampling.json").write_text(json.dumps(results, indent=1) + "\n")
    rows = rows_of(results)
    table("length upsampling", HEAD, rows)
    markdown.fill(HERE / "README.md", "upsampling", markdown.table(HEAD, rows))
    findings = "\n".join(f"- {sentence}" for sentence in results["checks"]["sentences"])
    markdown.fill(HERE / "README.md", "upsampling findings", findings)
    say(findings)


if __name__ == "__main__":
    main()
