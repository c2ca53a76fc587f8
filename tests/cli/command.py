"""The command line as a process of its own, and the config of its tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

CONFIG = Path(__file__).parent / "tiny.py"


def lcx(words, limit=None):
    """The command as a process of its own on one device; no file it writes may pass `limit` bytes: a full disk's stand-in.

    It compiles as the tests do, so that it finds what another process of the test run has compiled.
    """
    before = [] if limit is None else [f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"]
    code = "\n".join([*before, "from lcx.cli.main import main", "main()"])
    flags = re.sub("device_count=[0-9]+", "device_count=1", os.environ["XLA_FLAGS"])
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], env=env, capture_output=True, text=True)
