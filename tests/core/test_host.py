"""A command starts itself again with huge pages, once; memory that was freed stays with the process where that is asked for."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lcx.core import host

ROOT = Path(__file__).parents[2]
UNITS = host.multiplies_bfloat16.__wrapped__  # type: ignore[attr-defined]
PROGRAM = """
import os, sys
from lcx.core.host import take_huge_pages

take_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
"""


@pytest.mark.parametrize("present", [None, "glibc.malloc.check=0"])
def test_the_command_keeps_its_words_and_what_is_set(present):
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | {"PYTHONPATH": str(ROOT)}
    env |= {"GLIBC_TUNABLES": present} if present else {}
    done = subprocess.run([sys.executable, "-c", PROGRAM, "--a=b c", "d"], env=env, capture_output=True, text=True)
    wanted = present or (host.HUGE_PAGES if helps(env) else None)
    assert done.stdout == f"{wanted} ['--a=b c', 'd']\n", done.stderr


def helps(env):
    """What `huge_pages_help` says in that environment."""
    code = "from lcx.core.host import huge_pages_help; print(huge_pages_help())"
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    return said == "True\n"


def test_no_huge_pages_beside_an_accelerator(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(host.glob, "glob", lambda pattern: ["/dev/nvidia0"] if "nvidia" in pattern else [])
    assert not host.huge_pages_help()


@pytest.mark.parametrize(
    "flags,granted,found", [("amx_bf16 avx", True, True), ("amx_bf16 avx", False, False), ("avx512_bf16", True, False)]
)
def test_units_for_bfloat16_are_there_and_granted(flags, granted, found, monkeypatch):
    class Kernel:
        def syscall(self, *numbers):
            assert numbers == (158, 0x1023, 18)
            return 0 if granted else -1

    monkeypatch.setattr(host.sys, "platform", "linux")
    monkeypatch.setattr(host.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(host.Path, "read_text", lambda path: f"flags : fpu {flags}")
    monkeypatch.setattr(host.ctypes, "CDLL", lambda name: Kernel())
    assert UNITS() is found
    monkeypatch.setattr(host.platform, "machine", lambda: "aarch64")
    assert UNITS() is False


FREED = """
import resource, sys
import numpy as np
from lcx.core.host import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(100):
    a, b, c = (np.ones(1 << 18) for _ in range(3))
    del a, b, c
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_memory_that_was_freed_is_not_cleared_again():
    faults = {}
    for what in ("keep", "return"):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": ""}
        done = subprocess.run([sys.executable, "-c", FREED, what], env=env, capture_output=True, text=True, check=True)
        faults[what] = int(done.stdout)
    assert faults["keep"] < faults["return"] / 4


IN_PIECES = """
import numpy as np
import psutil
from lcx.core.host import give_back_freed_memory

held = []
pieces = [np.ones(1 << 13) for _ in range(3200)]
held += pieces[::32]
del pieces
before = psutil.Process().memory_info().rss
give_back_freed_memory()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_memory_freed_between_what_stays_is_given_back():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": ""}
    done = subprocess.run([sys.executable, "-c", IN_PIECES], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0.9 * 3100 * (8 << 13)


def tree(root, cgroup, **files):
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


STAT = "anon 5\ninactive_file 3000000\ntotal_inactive_file 3000000\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "wanted"),
    [
        # Version 2: the lowest of the limits of a group and those above it, files in memory not counted as used.
        (
            "0::/a/b\n",
            {"a/b/memory.max": "max", "a/memory.max": "9000000", "a/memory.current": "7000000", "a/memory.stat": STAT},
            5e6,
        ),
        ("0::/\n", {"memory.max": "9000000", "memory.current": "7000000"}, 2e6),
        ("0::/\n", {"memory.max": "9000000", "memory.current": "9000001"}, 0),
        # Version 1, whose path a container does not see.
        (
            "4:memory:/docker/1\n3:cpu:/x\n",
            {"memory/memory.limit_in_bytes": "8000000", "memory/memory.usage_in_bytes": "6000000", "memory/memory.stat": STAT},
            5e6,
        ),
    ],
)
def test_memory_within_a_container(tmp_path, cgroup, files, wanted):
    named = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    assert host.available_memory(tree(tmp_path, cgroup, **named)) == wanted


@pytest.mark.parametrize("cgroup", ["0::/\n", "4:cpu:/x\n"])
def test_memory_without_a_limit_is_the_machine_s(tmp_path, cgroup):
    limits = {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "5\n"}
    assert host.available_memory(tree(tmp_path, cgroup, **limits)) > 1e8
    assert host.available_memory(tmp_path / "nowhere") > 1e8


@pytest.mark.parametrize(
    ("cgroup", "files", "wanted"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("3:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "100000", "cpu/x/cpu.cfs_period_us": "100000"}, 1),
        ("3:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, 8),
        ("0::/\n", {}, 8),
    ],
)
def test_cores_within_a_container(tmp_path, monkeypatch, cgroup, files, wanted):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    named = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    assert host.cores(tree(tmp_path, cgroup, **named)) == wanted


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_a_process_ends_with_its_parent_even_if_that_is_killed():
    child = (
        "import signal, sys, time; from lcx.core.host import end_with_parent; end_with_parent(signal.SIGKILL); print(flush=True)"
    )
    command = [sys.executable, "-c", f"{child}; time.sleep(600)"]
    start = f"import subprocess; p = subprocess.Popen({command!r}); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert parent.stdout.readline() == "\n"  # the child has asked for it
        parent.kill()
    until = time.monotonic() + 60
    while _runs(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid):
    """Whether a process is there, and has not ended without anybody who asks for its status."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
