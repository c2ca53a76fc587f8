"""Training steps compiled ahead for TPUs that are not here, at lengths that the compiler could not take before."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.training.ahead import LIBRARY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not LIBRARY.exists() and importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: see the Makefile"
    ),
]

CHIP = 95.7 * 2**30
"""Bytes of a v5p."""


def compiled(*arguments):
    """What a chip needs in bytes, and what was said where it did not compile."""
    command = [sys.executable, "-m", "tests.training.ahead", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None, done.stderr


def test_a_quarter_of_a_million_tokens_a_chip_compile():
    """Llama 3 8B's feed-forward layer has 262,144 x 14,336 inner activations there, more than 2^31: libtpu aborted on them."""
    needed, said = compiled("v5p:2x2x1", "1048576", "--layers=2", "--remat=block")
    assert needed is not None, said[-2000:]
    assert needed["temp_size_in_bytes"] + needed["argument_size_in_bytes"] < CHIP
