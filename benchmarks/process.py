"""A side of a benchmark: a process of its own that answers each line with a line of JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from lcx.core.host import HUGE_PAGES, huge_pages_help

HERE = Path(__file__).resolve().parent


class Process:
    """`sides/<script>.py` for one case, with huge pages where they help, as `lcx` starts itself. `facts` is its first answer.

    `own_packages`: it sees what is on this interpreter's PYTHONPATH, and lcx.
    """

    def __init__(self, name: str, script: str, case: dict[str, Any], python: str = sys.executable, own_packages: bool = True):
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if own_packages:
            paths = (str(HERE.parent), os.environ.get("PYTHONPATH"))
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        if huge_pages_help():
            environment["GLIBC_TUNABLES"] = HUGE_PAGES
        command = [python, str(HERE / "sides" / f"{script}.py"), json.dumps(case)]
        self._name = name
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._read()

    def ask(self, line: str = "") -> dict[str, Any]:
        """The answer to a line."""
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._read()

    def finish(self) -> dict[str, int]:
        """End the process; its memory."""
        self._process.stdin.close()
        memory = self._read()
        self._process.wait()
        return memory

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the {self._name} side ended with exit code {self._process.wait()}; what it said is above")
        return json.loads(line)


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()
