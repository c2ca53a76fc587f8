"""How JAX sees a CPU: as one device whose operations take several threads, or as several devices.

Devices that share a model's heads keep the cores at work where the threads of one operation after another do not: figures are in
benchmarks/README.md. The number can only be chosen before JAX starts a backend, which `jax.devices()` and the first array do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax

from lcx.core import host, processes
from lcx.core.errors import UserError

MOST = 512
"""The most devices that a CPU may be split into: each one has its own threads."""

_FLAG = "--xla_force_host_platform_device_count"


class _State:
    """What was chosen for this process, as JAX keeps its own settings."""

    sharing = 1


def split(count: int) -> None:
    """Split the CPU into `count` devices, as the user says; raises `UserError` for too many."""
    if count > MOST:
        raise UserError(f"--host_devices={count} is too many; give at most {MOST}")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}={count}".strip()


def share(num_heads: int, num_kv_heads: int, lengths: Sequence[int]) -> None:
    """Split the CPU into as many devices as its cores, the heads and the lengths of rows allow.

    Nothing is done where the user has chosen a number, JAX has started, or this process has partners. Whether there is only a
    CPU will be known when JAX starts; beside an accelerator the devices of the CPU are not used.
    """
    if _FLAG in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ or processes.count() > 1 or _has_started():
        return
    _State.sharing = most_sharing(host.cores(), (num_heads, num_kv_heads, *lengths))
    if _State.sharing > 1:
        jax.config.update("jax_num_cpu_devices", _State.sharing)


def most_sharing(cores: int, sizes: Sequence[int]) -> int:
    """The largest number of devices, at most `cores`, that divides all `sizes`."""
    return next(n for n in range(min(cores, MOST), 0, -1) if all(size % n == 0 for size in sizes))


def sharing() -> int:
    """How many devices of a CPU `share` has made; 1 where it has not, and where an accelerator computes. Starts JAX."""
    return _State.sharing if _State.sharing > 1 and jax.default_backend() == "cpu" else 1


def _has_started() -> bool:
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()
