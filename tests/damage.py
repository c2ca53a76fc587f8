"""Random damage to what lies on a disk: one of its files flipped, zeroed, cut, removed, or exchanged with another."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

KINDS = ("flipped", "zeroed", "cut", "missing", "swapped")

UNREAD = re.compile(r"commit_success\.txt$|\.lock$|\.md$|\.png$")
"""Files that nothing is read from: marks of orbax, locks, cards."""


def files(folder: Path) -> list[Path]:
    """The files of a folder that count, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not UNREAD.search(path.name))


def damage(folder: Path, kind: str, rng: random.Random, spared: tuple[str, ...] = ()) -> str:
    """Damage one of a folder's files, other than `spared` ones; returns what was done."""
    found = [path for path in files(folder) if path.name not in spared and path.stat().st_size]
    path = rng.choice(found)
    before = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(before[: rng.randrange(len(before))])
    elif kind == "swapped":
        other = rng.choice([one for one in found if one.read_bytes() != before])
        path.write_bytes(other.read_bytes())
        other.write_bytes(before)
        return f"{path.relative_to(folder)} swapped with {other.relative_to(folder)}"
    else:
        # Of orbax's metadata only what lcx keeps there is read: not when the checkpoint was written, nor how.
        first = before.index(b'"custom_metadata"') if path.name == "_CHECKPOINT_METADATA" else 0
        after = bytearray(before)
        while bytes(after) == before:
            at = rng.randrange(first, len(before))
            if kind == "zeroed":
                end = min(len(before), at + rng.choice((1, 64, 4096)))
                after[at:end] = bytes(end - at)
            else:
                for _ in range(rng.choice((1, 2))):
                    after[rng.randrange(first, len(before))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(after))
    return f"{path.relative_to(folder)} {kind}"


def fresh(folder: Path, into: Path) -> Path:
    """A copy to be damaged."""
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(folder, into)
    return into
