"""A run's metrics, one row a step, fetched from the device one step late."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from lcx.core.chips import known_chip
from lcx.core.configs import choice, positive
from lcx.core.errors import UserError
from lcx.core.mesh import fast_dtype

TIMING = ("time", "tokens_per_second", "mfu", "data_wait", "host_memory")
"""Fields of a row that differ between two identical runs; all others are bitwise equal."""

KNOWN = ("jsonl", "tensorboard", "wandb")
"""The writers there are; `lcx.training.writers.WRITERS` has them."""


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    """Where metrics go, and what MFU refers to.

    `writers` are names between commas: jsonl, which reports and resuming read, tensorboard, and wandb (extra `wandb`).
    `peak_flops`: operations per second of one device, for MFU (None: from the table, or measured).
    """

    writers: str = "jsonl,tensorboard"
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        positive("metrics", peak_flops=self.peak_flops)
        for name in self.names:
            choice("metrics.writers", name, KNOWN)
            if self.names.count(name) > 1:
                raise UserError(f"metrics.writers={self.writers} names {name} twice; once is enough")
        if "jsonl" not in self.names:
            raise UserError(f"metrics.writers={self.writers} lacks jsonl, which reports and resuming read; add it")

    @property
    def names(self) -> list[str]:
        """The writers one by one."""
        return [name.strip() for name in self.writers.split(",")]


def peak_flops(device: jax.Device, given: float | None = None) -> float:
    """Peak operations per second for MFU: `given`, the data sheet's, or what a large matrix product reaches on this machine."""
    if given is not None:
        return given
    chip = known_chip(device)
    return chip.device_flops if chip is not None else _measure(device)


@functools.lru_cache(maxsize=4)
def _measure(device: jax.Device) -> float:
    size = 1024
    with jax.default_device(device):
        x = jnp.ones((size, size), fast_dtype(device.platform))
        product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
        product(x, x).block_until_ready()
        best = math.inf
        for _ in range(5):
            start = time.perf_counter()
            product(x, x).block_until_ready()
            best = min(best, time.perf_counter() - start)
    # Devices of one host's CPU share its cores: each has its share of the peak.
    share = jax.local_device_count() if device.platform == "cpu" else 1
    return 2 * size**3 / best / share


@dataclasses.dataclass(frozen=True)
class Meter:
    """Converts the time of a step to tokens/s and MFU; `tokens` and `flops` are per step, all fields over all devices."""

    tokens: int
    flops: float
    peak: float

    def speed(self, seconds: float) -> dict[str, float]:
        """Figures of a step that took `seconds`."""
        return {"tokens_per_second": self.tokens / seconds, "mfu": self.flops / seconds / self.peak}


def row(
    place: Mapping[str, Any], metrics: Mapping[str, jax.Array], timing: Mapping[str, float], parts: Sequence[str] = ()
) -> dict[str, Any]:
    """One row of `metrics.jsonl`; waits until the device has the metrics.

    `parts` names the entries of metrics `[P]`; parts without a token to learn from in the step are left out.
    """
    fetched = jax.device_get(dict(metrics))
    values: dict[str, Any] = {name: value.item() for name, value in fetched.items() if not value.ndim}
    there = fetched["weight_by_part"] > 0 if "weight_by_part" in fetched else ()
    for name in (name for name, value in fetched.items() if value.ndim):
        given = zip(parts, fetched[name].tolist(), there, strict=True)
        values[name] = {part: value for part, value, seen in given if seen}
    perplexity = math.exp(min(values["loss"], 700.0)) if math.isfinite(values["loss"]) else math.inf
    memory = psutil.Process().memory_info().rss
    return {**place, **values, "perplexity": perplexity, **timing, "host_memory": memory, "time": time.time()}


def place_of(entry: Mapping[str, Any]) -> tuple[int, int, int]:
    """The place of a row in its run: (stage, attempt, step within the stage). Rows of a run are in this order."""
    return entry["stage_index"], entry["attempt"], entry["stage_step"]


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Add a JSON line to a file; raises `UserError` when the disk is full."""
    try:
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f"the disk of {path} is full ({error.strerror}); free disk space and rerun the same command") from error


def cut_partial_line(path: Path) -> None:
    """Cut off the last line of a JSONL file if a full disk or a kill ended it early, so that others can be added."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file, without a truncated last one; empty when the file does not exist."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries
