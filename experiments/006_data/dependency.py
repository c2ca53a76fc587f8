"""Do long-dependency scores tell books from text that is long for no reason?

    python experiments/006_data/dependency.py --model=SmolLM2-135M-Instruct --books='books/*.txt' --workdir=runs/006_dependency

Scores the same number of documents of each of three kinds: passages of books, the books' paragraphs in random order, and passages
of other books of a few hundred tokens joined together. Two CPU cores, half a minute a document. Resumes: what is scored is not
scored again. Writes dependency.json and the table of README.md beside this file.
"""

from __future__ import annotations

import argparse
import glob
import itertools
import json
import time
from pathlib import Path

import numpy as np

from lcx.core.configs import plain
from lcx.core.console import say
from lcx.data.curation.dependency import EntropyDropSettings, LdsSettings
from lcx.data.tokenizers.tokenizers import Tokenizer
from lcx.recipes.dependency import EntropyDrop, Lds
from lcx.recipes.reader import Reader, ReaderConfig
from lcx.report import markdown

HERE = Path(__file__).parent
TOKENS = 2048
JOINED = 256
"""Tokens of each of the passages that are joined."""
KINDS = ("books", "shuffled", "joined")
SCORES = {
    "lds": (Lds, LdsSettings(window=TOKENS, pairs=16)),
    "entropy_drop": (EntropyDrop, EntropyDropSettings(window=TOKENS, short=256, step=256, tail=0.5)),
}


def paragraphs(path: str) -> list[str]:
    """The paragraphs of the middle nine tenths of a book, without the licence around it."""
    found = [part.strip() for part in Path(path).read_text(errors="replace").split("\n\n") if part.strip()]
    return found[len(found) // 20 : -len(found) // 20]


def cut(tokenizer: Tokenizer, parts: list[str], size: int) -> str:
    """The first `size` tokens of the paragraphs."""
    chosen = itertools.takewhile(lambda i: sum(map(len, parts[:i])) < 12 * size, range(len(parts)))
    return tokenizer.decode(tokenizer.encode("\n\n".join(parts[i] for i in chosen))[:size])


def documents(books: list[str], tokenizer: Tokenizer, count: int) -> list[tuple[int, str, str]]:
    """Number, kind and text of the documents: `count` of each kind, number i of a book and of its paragraphs in random order."""
    rng, made = np.random.default_rng(0), []
    order = [books[i] for i in rng.permutation(len(books))]
    for number, path in enumerate(order[:count]):
        parts = paragraphs(path)
        first = int(rng.integers(len(parts) // 2))
        made.append((number, "books", cut(tokenizer, parts[first:], TOKENS)))
        made.append((number, "shuffled", cut(tokenizer, [parts[i] for i in rng.permutation(len(parts))], TOKENS)))
        passages = []
        for other in rng.choice(order[count:], -(-TOKENS // JOINED), replace=False):
            parts = paragraphs(str(other))
            passages.append(cut(tokenizer, parts[int(rng.integers(len(parts) - 50)) :], JOINED))
        made.append((number, "joined", cut(tokenizer, passages, TOKENS)))
    return made


def auc(high: list[float], low: list[float]) -> float:
    """How often one of `high` is above one of `low`; a tie is a half."""
    return float(np.mean([(x > y) + 0.5 * (x == y) for x in high for y in low]))


def measure(reader: Reader, books: list[str], count: int, workdir: Path) -> list[dict]:
    """Scores of all documents, one a line in the workdir."""
    workdir.mkdir(parents=True, exist_ok=True)
    file = workdir / "scores.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    made = {name: kind(reader, settings) for name, (kind, settings) in SCORES.items()}
    for number, kind, text in documents(books, reader.tokenizer, count):
        for name, scorer in made.items():
            where = {"document": number, "kind": kind, "score": name, "fingerprint": scorer.fingerprint}
            if any(where.items() <= row.items() for row in rows):
                continue
            start = time.perf_counter()
            rows.append({**where, "value": float(scorer([text])[0]), "seconds": round(time.perf_counter() - start, 1)})
            with file.open("a") as out:
                out.write(json.dumps(rows[-1]) + "\n")
            say(f"{number} {kind} {name}: {rows[-1]['value']:.4g} in {rows[-1]['seconds']:.0f} s")
    prints = {scorer.fingerprint for scorer in made.values()}
    return [row for row in rows if row["fingerprint"] in prints and row["document"] < count]


def summary(rows: list[dict]) -> dict[str, dict]:
    """Means by kind, the AUC of books against each other kind, and how often a book is above its own shuffled paragraphs."""
    found = {}
    for name in SCORES:
        own = [row for row in rows if row["score"] == name]
        by_kind = {kind: {row["document"]: row["value"] for row in own if row["kind"] == kind} for kind in KINDS}
        values = {kind: list(one.values()) for kind, one in by_kind.items()}
        found[name] = {
            "mean": {kind: float(np.mean(one)) for kind, one in values.items()},
            "auc": {kind: auc(values["books"], values[kind]) for kind in KINDS[1:]},
            "pairs": float(np.mean([by_kind["books"][i] > value for i, value in by_kind["shuffled"].items()])),
        }
    return found


def record(rows: list[dict], model: str, count: int) -> None:
    """Write dependency.json and the table of README.md."""
    found = summary(rows)
    settings = {name: plain(one) for name, (_, one) in SCORES.items()}
    content = {
        "model": model, "documents": count, "tokens": TOKENS, "settings": settings, "summary": found,
        "rows": [{key: row[key] for key in ("document", "kind", "score", "value", "seconds")} for row in rows],
    }  # fmt: skip
    (HERE / "dependency.json").write_text(json.dumps(content, indent=1) + "\n")
    columns = ("score", *KINDS, "AUC: shuffled", "AUC: joined", "above its own shuffled")
    table = []
    for name, of in found.items():
        means, aucs = (f"{of['mean'][kind]:.3g}" for kind in KINDS), (f"{of['auc'][kind]:.2f}" for kind in KINDS[1:])
        table.append((name, *means, *aucs, f"{of['pairs']:.0%}"))
    markdown.fill(HERE / "README.md", "dependency", markdown.table(columns, table))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="what lcx eval takes as a checkpoint")
    parser.add_argument("--books", required=True, help="text files, as a glob pattern")
    parser.add_argument("--workdir", type=Path, default=Path("runs/006_dependency"))
    parser.add_argument("--documents", type=int, default=8, help="documents of each kind")
    args = parser.parse_args()
    reader = Reader.load(ReaderConfig(args.model, tokens_per_forward=TOKENS))
    rows = measure(reader, sorted(glob.glob(args.books)), args.documents, args.workdir)
    record(rows, Path(args.model).name, args.documents)


if __name__ == "__main__":
    main()
