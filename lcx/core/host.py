"""How a process uses the memory of its host: settings that act at its start, before JAX is there."""

from __future__ import annotations

import glob
import os
import platform
import sys

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""glibc's allocator (2.35 or newer, others ignore it) asks the kernel for huge pages.

XLA's CPU backend takes the temporary memory of a step anew at each step. In pages of 4 KiB that is a hundred thousand page faults,
and a step takes a fifth longer.
"""


def huge_pages_help() -> bool:
    """Whether huge pages are not asked for and would help: Linux with glibc, and no accelerator to compute on instead."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
        return False
    accelerators = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")
    return not any(glob.glob(pattern) for pattern in accelerators)


def take_huge_pages() -> None:
    """Start this command again with huge pages if they help; nothing the second time. The process stays the same one."""
    if huge_pages_help():
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
