"""What a process has of its host, memory and cores; huge pages must be asked for before JAX is loaded."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import math
import os
import platform
import signal
import sys
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Asks glibc's allocator (2.35 or newer; others ignore it) to request huge pages from the kernel.

XLA's CPU backend allocates the temporary memory of a step anew at each step. With pages of 4 KiB that is a hundred thousand
page faults, which make a step a fifth slower.
"""


def huge_pages_help() -> bool:
    """Whether huge pages are not yet requested and would help: Linux with glibc, and no accelerator to compute on instead."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
        return False
    return not has_accelerators()


def has_accelerators() -> bool:
    """Whether Linux shows an accelerator under /dev, of NVIDIA, Google or AMD; JAX, which may not want it, is not asked."""
    return any(glob.glob(pattern) for pattern in ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd"))


def take_huge_pages() -> None:
    """Restart this command with huge pages if they help; does nothing the second time. The process id stays the same."""
    if huge_pages_help():
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: those it is bound to, within what the control groups of a container leave.

    `root` is where /proc and /sys are looked for.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *_core_limits(root)]))


_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18
"""Numbers of Linux on x86-64, by which a process asks for the registers of AMX."""


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU has units that multiply matrices of bfloat16 (Intel's AMX), and Linux lets this process use them.

    XLA's products of bfloat16 then take a quarter of the time of those of float32; without such units they take longer.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    with contextlib.suppress(OSError):
        if "amx_bf16" in Path("/proc/cpuinfo").read_text().split():
            return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0
    return False


def end_with_parent(number: int) -> None:
    """On Linux, have this process sent a signal when the one that started it ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)


def signal_name(number: int) -> str:
    """The name of a signal, as in SIGKILL; "signal 40" for one without."""
    return {int(one): one.name for one in signal.Signals}.get(number, f"signal {number}")


LEFT_ALONE = "compile"
"""Name of threads of a compiler whose result may not be waited for."""


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Around a whole command: one that exits does so although a compiler still runs in it, which would be waited for."""
    try:
        yield
    except SystemExit as left:
        if any(thread.name == LEFT_ALONE for thread in threading.enumerate()):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(left.code if isinstance(left.code, int) else int(left.code is not None))
        raise


def process_start() -> float:
    """When this process began, in seconds of the epoch: before the interpreter, whose start it includes."""
    return psutil.Process().create_time()


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _LARGEST_BYTES = 1 << 28, 1 << 25


def keep_freed_memory() -> None:
    """Have glibc's allocator keep freed memory (up to 256 MiB, of arrays up to 32 MiB) instead of giving it back to the kernel.

    For work in blocks whose arrays are allocated anew each time: the kernel would clear every page of them again. Other allocators
    are left as they are.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def give_back_freed_memory() -> None:
    """Have glibc's allocator give the kernel all memory that has been freed; other allocators are left as they are.

    A compiler frees what it took in pieces between others that stay, and glibc keeps them: 0.7 GB for a step of a model of 30
    layers, whose large arrays, allocated apart, do not fit there.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that can be taken without swapping, within what the control groups of a container leave.

    `root` is where /proc and /sys are looked for.
    """
    return max(0, min([psutil.virtual_memory().available, *(limit - used for limit, used in _group_limits(root))]))


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """The limit and the use, in bytes, of this process's control groups and those above them, in either version's files."""
    versions = {
        "": ("memory.max", "memory.current", "inactive_file"),
        "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    for version, group in _groups(root, versions):
        *names, inactive = versions[version]
        limit, used = ("".join(_lines(group / name)) for name in names)
        if limit.isdigit() and used.isdigit():
            # Pages of files that nobody has touched lately are given back on demand.
            spare = [int(line.split()[1]) for line in _lines(group / "memory.stat") if line.split()[0] == inactive]
            yield int(limit), int(used) - sum(spare)


def _core_limits(root: Path) -> Iterator[int]:
    """Whole cores whose time this process's control groups and those above them grant, in either version's files."""
    for version, group in _groups(root, ("", "cpu")):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if version else ("cpu.max",)
        words = [word for name in names for line in _lines(group / name) for word in line.split()]
        if len(words) == 2 and all(word.isdigit() for word in words):
            yield math.ceil(int(words[0]) / int(words[1]))


def _groups(root: Path, controllers: Collection[str]) -> Iterator[tuple[str, Path]]:
    """The folders of this process's control groups and those above them, by controller; that of version 2 is the empty one."""
    for line in _lines(root / "proc/self/cgroup"):
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            if name in controllers:
                top = root / "sys/fs/cgroup" / name
                own = top / path.strip("/")
                yield from ((name, group) for group in (own, *(one for one in own.parents if one.is_relative_to(top))))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
