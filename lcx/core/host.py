"""How a process uses host memory; huge pages must be asked for before JAX is loaded."""

from __future__ import annotations

import ctypes
import glob
import os
import platform
import sys

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Asks glibc's allocator (2.35 or newer; others ignore it) to request huge pages from the kernel.

XLA's CPU backend allocates the temporary memory of a step anew at each step. With pages of 4 KiB that is a hundred thousand
page faults, which make a step a fifth slower.
"""


def huge_pages_help() -> bool:
    """Whether huge pages are not yet requested and would help: Linux with glibc, and no accelerator to compute on instead."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
        return False
    accelerators = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")
    return not any(glob.glob(pattern) for pattern in accelerators)


def take_huge_pages() -> None:
    """Restart this command with huge pages if they help; does nothing the second time. The process id stays the same."""
    if huge_pages_help():
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


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
