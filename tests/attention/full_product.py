"""The full products of options: one JSON line a case, and finished cases are not run again.

    python -m tests.attention.full_product blockwise --out=blockwise.jsonl       blockwise against dense
    python -m tests.attention.full_product context --fast --out=context.jsonl    split over 2 to 8 host devices against dense

Kill it and run it again as you like. Ends with status 1 when a case is out of tolerance. blockwise compiles about 430 programs, ten
seconds each, a third of that with `--fast`; context about 5,800.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys

import jax
from rich.progress import track

from tests.attention import cases, context_cases

PRODUCTS = {"blockwise": cases, "context": context_cases}


def finished(path: pathlib.Path) -> dict[str, bool]:
    """Case → passed, from the whole lines of a result table; a line cut off by a kill is dropped from the file."""
    if not path.exists():
        return {}
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    rows = [json.loads(line) for line in whole.splitlines()]
    return {json.dumps(row["case"], sort_keys=True): row["passed"] for row in rows}


def main() -> int:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("product", choices=PRODUCTS)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSONL result table, appended to")
    parser.add_argument("--limit", type=int, default=None, help="stop after this many new cases")
    parser.add_argument("--fast", action="store_true", help="compile without LLVM's optimisations, as the tests do")
    parser.add_argument("--part", default="1/1", help="2/3: the second of three parts, each with a table of its own")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_num_cpu_devices", 8)
    chosen = PRODUCTS[arguments.product]
    done = finished(arguments.out)
    mine = chosen.product()
    mine = mine[(part - 1) * len(mine) // parts : part * len(mine) // parts]
    todo = [case for case in mine if json.dumps(case, sort_keys=True) not in done][: arguments.limit]
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
