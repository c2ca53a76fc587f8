"""What a TPU's compiler writes down before it makes code: the step's scheduled text, and where each of its buffers lies.

Making code is most of a compilation and changes neither, so that nobody waits for it: the compiler runs with xla_dump_to, and is
ended once both are on the disk.
"""

from __future__ import annotations

import re
from pathlib import Path

HOST = 5
"""XLA's number of the host's memory, the S(5) of its layouts; arrays without a number lie in the device's own."""

_LAST = ".after_optimizations-memory-usage-report.txt"
"""Written after the two that are read; XLA closes one file before it opens the next."""


def written(folder: Path, program: str) -> tuple[str, str] | None:
    """The scheduled text of a program and its buffers, once both are there whole; else None.

    `folder` is that of xla_dump_to; `program` the name that XLA has for it, as in jit_train.
    """
    last = next(folder.glob(f"module_*.{program}.*{_LAST}"), None)
    if last is None:
        return None
    begin = last.name.removesuffix(_LAST)
    text = folder / f"{begin}.after_optimizations.txt"
    buffers = folder / f"{begin}.after_optimizations-buffer-assignment.txt"
    return text.read_text(), buffers.read_text()


def memory(buffers: str) -> dict[str, int]:
    """Bytes on a device that XLA's buffers take: of arguments, of what else there is at the fullest, of both, and on the host.

    Results take the place of arguments that were given away; other results are among what else there is.
    """
    arguments = device = host = 0
    for line in re.findall(r"^allocation \d+: (size \d+.*)$", buffers, re.MULTILINE):
        size = int(line.split()[1].rstrip(",:"))
        number = re.search(r", color (\d+)", line)
        if number is None:
            device += size
            arguments += size if ", parameter " in line else 0
        elif int(number[1]) == HOST:
            host += size
    return {"arguments": arguments, "temporary": device - arguments, "peak": device, "host_temporary": host}
