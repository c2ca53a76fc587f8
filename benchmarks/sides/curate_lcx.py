"""One whole curation of books and Python's standard library, or of one file, without model scores: seconds, and memory of all
processes together.

Imports are inside `main`, because worker processes import this file. The start of Python and its imports are not timed, that of
the workers is.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Curate for the case in `argv[1]` and print a line of JSON."""
    from lcx.core.configs import build
    from lcx.data.curation.config import CurationConfig, curated, defaults
    from lcx.data.curation.pipeline import curate

    case = json.loads(sys.argv[1])
    if "grown" in case:
        values = defaults(grown=curated("long", source={"kind": "jsonl", "path": case["grown"]}))
    else:
        books = curated("long", source={"kind": "text", "path": case["books"]})
        values = defaults(books=books, code=curated("long", source={"kind": "stdlib"}))
    config = build(CurationConfig, values.to_dict())
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), _processor()
        report = curate(config, f"{folder}/out", case["workers"])
        found = {"wall": time.perf_counter() - wall, "cpu": _processor() - cpu}
    sources = report["sources"].values()
    found["bytes"] = sum(source["read"]["bytes"] for source in sources)
    found["read"] = sum(source["read"]["documents"] for source in sources)
    found["kept"] = sum(source["kept"]["documents"] for source in sources)
    parent, worker = _peak(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    found["peak_bytes"] = parent + (case["workers"] * worker if case["workers"] > 1 else 0)
    print(json.dumps(found))


def _peak() -> int:
    """This process's own, in bytes: `ru_maxrss` begins with what the process that started it had."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))


def _processor() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


if __name__ == "__main__":
    main()
