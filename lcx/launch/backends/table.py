"""Where jobs can be started, besides this machine."""

from __future__ import annotations

from lcx.launch.backends import gke, skypilot, slurm, tpu_vm
from lcx.launch.job import Backend

BACKENDS: dict[str, Backend] = {
    "tpu_vm": tpu_vm.BACKEND,
    "gke": gke.BACKEND,
    "slurm": slurm.BACKEND,
    "skypilot": skypilot.BACKEND,
}
"""Value of `--backend` -> the platform. To add one: a file with options, files and the words that submit them, and a row here."""
