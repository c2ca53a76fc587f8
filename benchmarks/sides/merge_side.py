"""One merge by lcx or by mergekit, or a copy of the bytes that a merge reads and writes: seconds, and memory beyond the imports."""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lcx(case: dict[str, Any]) -> Callable[[], None]:
    """`lcx merge`, with all imports done."""
    import yaml

    from lcx.merging.merge import Merge

    folder = tempfile.mkdtemp()
    path = Path(folder, "merge.yml")
    path.write_text(yaml.safe_dump(case["yaml"]))
    return lambda: Merge(path).write(Path(case["out"]))


def mergekit(case: dict[str, Any]) -> Callable[[], None]:
    """mergekit with its defaults, in the types that the file names; what it wrote is then put on the disk."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    config = MergeConfiguration.model_validate(case["yaml"])

    def run() -> None:
        run_merge(config, case["out"], MergeOptions(quiet=True, copy_tokenizer=False))
        for path in Path(case["out"]).glob("*.safetensors"):
            with path.open("rb+") as file:
                os.fsync(file.fileno())

    return run


def files(case: dict[str, Any]) -> Callable[[], None]:
    """Both models read, and the bytes of the first written."""

    def run() -> None:
        buffer = memoryview(bytearray(1 << 24))
        out = Path(case["out"])
        out.mkdir()
        for path in sorted(Path(case["folder"], "base").glob("*.safetensors")):
            with path.open("rb", buffering=0) as file, (out / path.name).open("wb", buffering=0) as copy:
                while count := file.readinto(buffer):
                    copy.write(buffer[:count])
                os.fsync(copy.fileno())
        for path in sorted(Path(case["folder"], "tuned").glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return run


def _held() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))


def _processor() -> float:
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def main() -> None:
    """Run the case in `argv[1]` and print a line of JSON."""
    case = json.loads(sys.argv[1])
    run = {"lcx": lcx, "mergekit": mergekit, "files": files}[case["side"]](case)
    before, start, processor = _held(), time.perf_counter(), _processor()
    run()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "processor_seconds": _processor() - processor, "bytes": _held() - before}))


if __name__ == "__main__":
    main()
