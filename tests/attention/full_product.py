"""The full products of options: one JSON line a case, and finished cases are not run again.

    python -m tests.attention.full_product blockwise --out=blockwise.jsonl       blockwise against dense
    python -m tests.attention.full_product context --fast --out=context.jsonl    split over 2 to 8 host devices against dense
    python -m tests.attention.full_product context --keep context.jsonl          sums up into results/

Kill it and run it again as you like. Ends with status 1 when a case is out of tolerance. blockwise compiles about 430 programs, ten
seconds each, a third of that with `--fast`; context about 2,850, in an hour or two.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import pathlib
import sys
from typing import Any

import jax
from rich.progress import track

from tests.attention import cases, context_cases

PRODUCTS = {"blockwise": cases, "context": context_cases}
FAMILIES = {"blockwise": ("mask", "bias", "pieces"), "context": ("size", "strategy", "layout", "mask", "scheme")}
"""What a line of a kept summary is of; it counts the cases over all other options."""
RESULTS = pathlib.Path(__file__).parent / "results"


def key(case: dict[str, Any]) -> str:
    """A case as text, whatever the order of its options."""
    return json.dumps(case, sort_keys=True)


def keep(product: str, tables: list[pathlib.Path]) -> int:
    """Write `results/<product>.csv`: cases, those within tolerance and the largest errors of every family."""
    rows = {key(row["case"]): row for table in tables for row in map(json.loads, table.read_text().splitlines())}
    families: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    wanted = PRODUCTS[product].product()
    missing = [case for case in wanted if key(case) not in rows]
    if missing:
        print(f"{len(missing)} of {len(wanted)} cases are missing, the first of them {missing[0]}")
        return 1
    for case in wanted:
        families.setdefault(tuple(str(case[name]) for name in FAMILIES[product]), []).append(rows[key(case)])
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{product}.csv").open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow((*FAMILIES[product], "cases", "passed", "worst output", "worst gradient"))
        for family, found in families.items():
            output = max(row["errors"]["o"] for row in found)
            gradient = max(value for row in found for name, value in row["errors"].items() if name != "o")
            out.writerow((*family, len(found), sum(row["passed"] for row in found), f"{output:.1e}", f"{gradient:.1e}"))
    failed = sum(not rows[key(case)]["passed"] for case in wanted)
    print(f"{len(wanted)} cases in {len(families)} families, {failed} out of tolerance")
    return int(failed > 0)


def finished(path: pathlib.Path) -> dict[str, bool]:
    """Case → passed, from the whole lines of a result table; a line cut off by a kill is dropped from the file."""
    if not path.exists():
        return {}
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    rows = [json.loads(line) for line in whole.splitlines()]
    return {key(row["case"]): row["passed"] for row in rows}


def main() -> int:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("product", choices=PRODUCTS)
    todo_or_kept = parser.add_mutually_exclusive_group(required=True)
    todo_or_kept.add_argument("--out", type=pathlib.Path, help="JSONL result table, appended to")
    todo_or_kept.add_argument("--keep", type=pathlib.Path, nargs="+", help="tables to sum up, of all parts")
    parser.add_argument("--limit", type=int, default=None, help="stop after this many new cases")
    parser.add_argument("--fast", action="store_true", help="compile without LLVM's optimisations, as the tests do")
    parser.add_argument("--part", default="1/1", help="2/3: the second of three parts, each with a table of its own")
    arguments = parser.parse_args()
    if arguments.keep:
        return keep(arguments.product, arguments.keep)
    part, parts = map(int, arguments.part.split("/"))
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_num_cpu_devices", 8)
    # Thousands of programs, none of them twice: keys of a cache and rounds of collection take a fifth of the time.
    jax.config.update("jax_enable_compilation_cache", False)
    gc.set_threshold(100_000)
    chosen = PRODUCTS[arguments.product]
    done = finished(arguments.out)
    mine = chosen.product()
    mine = mine[(part - 1) * len(mine) // parts : part * len(mine) // parts]
    todo = [case for case in mine if key(case) not in done][: arguments.limit]
    failed = sum(not passed for passed in done.values())
    with arguments.out.open("a") as table:
        for case in track(todo, description="cases", disable=not sys.stderr.isatty()):
            found = chosen.errors(case, optimize=not arguments.fast)
            passed = cases.within(found)
            failed += not passed
            table.write(json.dumps({"case": case, "errors": found, "passed": passed, "optimized": not arguments.fast}) + "\n")
            table.flush()
            os.fsync(table.fileno())
    print(f"{len(done) + len(todo)} of {len(mine)} cases done, {failed} out of tolerance; table in {arguments.out}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
