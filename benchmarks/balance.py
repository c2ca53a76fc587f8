"""Packed rows dealt by their documents (`balanced`) against zigzag and a plain ring: counted work and bytes, time on host devices.

    python benchmarks/balance.py                 counts, under a minute: 8 and 64 devices, rows of at least 64 documents
    python benchmarks/balance.py --timed         ... and times attention over 8 host devices, forward and backward, in turns

Work is the number of query-key pairs that a device computes. A device waits, in every step, for the slowest of those with which it
exchanged keys. The rate is the mean work over the time until all are done, with transfers that the work before them hides as far as
it is long enough, or with none hidden; it is worked out for v5p by its data sheet and `lcx plan`'s efficiency, for 64 query heads
and 8 KV heads of 128 in bfloat16, the heads of Llama 3 70B. Rows of fewer documents are passed over.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tables
from context_parallel import in_turns
from jax.sharding import NamedSharding, PartitionSpec

from lcx.attention.attend import attend
from lcx.attention.parallel.balance import Balance, of_layout, of_pieces
from lcx.attention.parallel.dealing import deal
from lcx.attention.parallel.documents import CAUSAL, Documents, Windows
from lcx.attention.parallel.sequence_layout import arrange
from lcx.attention.spec import AttentionSpec
from lcx.core.batch import Index
from lcx.core.chips import CHIPS, TPU
from lcx.core.host import take_huge_pages
from lcx.core.mask import Mask
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.positions.scheme import SchemeSpec
from lcx.report import markdown

LEAST, ROWS = 64, 8
"""Documents of a row, and rows of a kind."""

SETTINGS = ((8, 16_384), (64, 16_384), (8, 131_072))
"""Devices, and tokens on each."""

WINDOW = 4096
QUERY_HEADS, KV_HEADS, HEAD_DIM, WIDTH = 64, 8, 128, 2

Lengths = Callable[[np.random.Generator, int], float]
"""(random stream, tokens of a row) -> the length of a document."""


def log_normal(median: float, sigma: float, most: float) -> Lengths:
    """Lengths of text as it is found."""
    return lambda rng, _: min(rng.lognormal(np.log(median), sigma), most)


DISTRIBUTIONS: dict[str, tuple[tuple[float, Lengths], ...]] = {
    "ProLong": (
        (0.60, lambda rng, _: 65_536),
        (0.03, log_normal(16_384, 0.6, 65_536)),
        (0.37, log_normal(700, 1.1, 65_536)),
    ),
    "books and code": ((0.50, log_normal(90_000, 0.6, 600_000)), (0.50, log_normal(1_500, 1.2, 65_536))),
    "uniform": ((1.0, lambda rng, tokens: rng.uniform(1, 4_000)),),
    "uniform, 66 a row": ((1.0, lambda rng, tokens: rng.uniform(1, tokens / 33)),),
}
"""Shares of the tokens and the lengths of documents. ProLong's first stage: 60% of code repositories and books in pieces of 65,536
tokens, textbooks, and a mix of short ones (arXiv 2410.02660)."""


def row(kind: str, tokens: int, rng: np.random.Generator) -> Documents:
    """A packed row of such documents in random order, the last one cut."""
    parts = DISTRIBUTIONS[kind]
    means = [statistics.fmean(draw(np.random.default_rng(seed), tokens) for seed in range(200)) for _, draw in parts]
    chance = np.asarray([share / mean for (share, _), mean in zip(parts, means, strict=True)])
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        draw = parts[rng.choice(len(parts), p=chance / chance.sum())][1]
        lengths.append(min(left, max(1, int(draw(rng, tokens)))))
    return Documents(rng.permutation(lengths).astype(np.int64), np.arange(1, len(lengths) + 1))


def rows(kind: str, tokens: int, count: int = ROWS) -> list[Documents]:
    """Rows of at least `LEAST` documents."""
    rng, found = np.random.default_rng(0), []
    while len(found) < count:
        drawn = row(kind, tokens, rng)
        if len(drawn.lengths) >= LEAST:
            found.append(drawn)
    return found


def transfer(tokens: int) -> float:
    """The pairs that a chip computes in the time in which the keys and values of so many tokens go to its neighbour."""
    chip = CHIPS["v5p"]
    return tokens * 2 * KV_HEADS * HEAD_DIM * WIDTH / chip.link * chip.flops * TPU.attention / (4 * QUERY_HEADS * HEAD_DIM)


def counted(kind: str, n: int, tokens: int, windows: Windows = CAUSAL) -> dict[str, Any]:
    """What rows of a kind take over n devices with `tokens` each; the other layout is zigzag, with a window contiguous."""
    found: dict[str, list[float]] = {}

    def note(layout: str, balance: Balance) -> None:
        rate, exposed = (float(balance.work.mean()) / balance.time(transfer(tokens), hidden) for hidden in (True, False))
        values = {
            "busiest": balance.busiest,
            "longest": balance.longest,
            "sent": balance.sent,
            "rate": rate,
            "exposed rate": exposed,
        }
        for name, value in values.items():
            found.setdefault(f"{layout} {name}", []).append(value)

    for documents in rows(kind, n * tokens):
        begin = time.perf_counter()
        pieces = deal(documents, n, windows)
        found.setdefault("milliseconds", []).append(1e3 * (time.perf_counter() - begin))
        found.setdefault("documents", []).append(len(documents.lengths))
        note("balanced", of_pieces(documents, pieces, n, windows))
        note("other", of_layout(documents, "zigzag" if windows == CAUSAL else "contiguous", n, windows))
    window = next((size for size, _ in windows if size is not None), None)
    return {"kind": kind, "devices": n, "tokens": tokens, "window": window, **found}


def program(documents: Documents, n: int, layout: str, heads: int = 8) -> Callable[[], Any]:
    """Attention over a packed row on n host devices, forward and backward, compiled."""
    length = int(documents.lengths.sum())
    segments = np.repeat(documents.segments, documents.lengths)[None].astype(np.int32)
    order = np.arange(length, dtype=np.int32)[None]
    q, k, v, do = np.random.default_rng(0).standard_normal((4, 1, length, heads, 64), np.float32)
    pieces = deal(documents, n)
    columns = pieces.columns if layout == "balanced" else arrange(np.arange(length)[None], "zigzag", n)[0]
    reach, there = None, segments[:, columns]
    if layout == "balanced":
        reach, there = (x[None].astype(np.int32) for x in (np.repeat(pieces.reach, pieces.length), pieces.segments(documents)))
    mesh = make_mesh(MeshConfig(fsdp=1, context=n))
    split = NamedSharding(mesh, PartitionSpec(None, ("ring", "ulysses")))
    spec = AttentionSpec(Mask(), SchemeSpec(), scale=64**-0.5, strategy="nested" if layout == "balanced" else "ring")
    dealt = [jax.device_put(x[:, columns], split) for x in (q, k, v, do)]
    index = Index(order[:, columns], order[:, columns], there, reach=reach, layout=layout)
    index = jax.device_put(index, split)

    def step(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, index: Index) -> tuple[jax.Array, ...]:
        o, pull = jax.vjp(lambda q, k, v: attend(spec, q, k, v, index, index, q_tables={}, k_tables={}), q, k, v)
        return (jnp.sum(o * do), *pull(do))

    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(*dealt, index).compile()
    return lambda: jax.block_until_ready(compiled(*dealt, index))


def timed(length: int, repeats: int) -> dict[str, Any]:
    """Seconds of both layouts in turns, over 8 host devices that share the cores of this machine, by kind of row."""
    found: dict[str, Any] = {"length": length, "devices": 8, "seconds": {}}
    for kind in DISTRIBUTIONS:
        documents = scaled(rows(kind, 131_072, 1)[0], length)
        programs = {layout: program(documents, 8, layout) for layout in ("zigzag", "balanced")}
        for run in programs.values():
            run()
        found["seconds"][kind] = in_turns(programs, repeats)
    return found


def scaled(documents: Documents, length: int) -> Documents:
    """The same documents, shorter, in a row of `length` tokens."""
    ends = np.round(np.cumsum(documents.lengths) * (length / documents.lengths.sum())).astype(np.int64)
    lengths = np.diff(ends, prepend=0)
    return Documents(lengths[lengths > 0], np.arange(1, int(np.sum(lengths > 0)) + 1))


def main() -> None:
    """Counts, times, prints the tables, writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timed", action="store_true", help="time attention, too; without it the times of before are kept")
    parser.add_argument("--length", type=int, default=16_384, help="tokens of the rows that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "balance.json")
    arguments = parser.parse_args()
    before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    found = [counted(kind, n, tokens) for kind in DISTRIBUTIONS for n, tokens in SETTINGS]
    found += [counted(kind, n, 16_384, ((WINDOW, 1.0),)) for kind in DISTRIBUTIONS for n in (8, 64)]
    result = {"counted": found, "timed": before.get("timed")}
    if arguments.timed:
        take_huge_pages()
        jax.config.update("jax_num_cpu_devices", 8)
        result["timed"] = {"jax": jax.__version__, **timed(arguments.length, arguments.repeats)}
    made = [tables.balance_counts(found)]
    if result["timed"]:
        made.append(tables.balance_seconds(result["timed"]))
    for header, lines in made:
        print(markdown.table(header, lines), end="\n\n")
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"figures in {arguments.out}")


if __name__ == "__main__":
    main()
