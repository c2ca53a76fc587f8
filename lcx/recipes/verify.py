"""Is what lies in a folder what was written there? Checkpoints, models, adapters, prepared and curated data alike."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from lcx.core import manifest
from lcx.core.console import say, table
from lcx.core.errors import UserError
from lcx.core.gguf import is_gguf
from lcx.core.numbers import counted
from lcx.data.sources import records
from lcx.training.checkpoints import FOLDER, Store
from lcx.training.loading import locate
from lcx.training.stages import CheckpointConfig
from lcx.training.workdir import CONFIG, OWN, read_config


@dataclasses.dataclass(frozen=True)
class Checked:
    """Something that was compared: what it is, how many arrays and files and bytes of it, and what is wrong, a phrase each."""

    what: str
    kind: str
    count: str
    bytes: int
    faults: tuple[str, ...] = ()


def verify(path: str | Path, update: bool = False) -> bool:
    """Compare all that has checksums at `path`, print what was found, and say whether all is well.

    `path` is a run, its checkpoints or one of them, any other folder that lcx wrote, or a GGUF file. With `update` manifests of
    folders are written anew, so that files changed on purpose count as they are. Raises `UserError` where nothing has checksums.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; name a run, an exported model, a dataset or another folder that lcx wrote")
    if update and (path / FOLDER).is_dir():
        raise UserError(
            f"{path} is a run, of which --update accepts nothing: its checkpoints are as they were written, or damaged; in a "
            f"config.json that you have changed, delete the entry {OWN!r}"
        )
    found = _run(path) if path.is_dir() and not update else []
    for place in _manifests(path):
        if update:
            _update(place)
        found.append(_manifest(place, path))
    if not any(one.bytes or one.faults for one in found):
        raise UserError(
            f"nothing could be checked: nothing in {path} has checksums, as it was written by an older lcx or by another program"
        )
    table(
        str(path),
        ("what", "kind", "compared", "bytes", "found"),
        [(one.what, one.kind, one.count, f"{one.bytes:,}", "damaged" if one.faults else "whole") for one in found],
        left=2,
    )
    damaged = [one for one in found if one.faults]
    for one in damaged:
        for fault in one.faults:
            say(f"{one.what}: {fault}")
    total = sum(one.bytes for one in found)
    say(f"{len(damaged)} of {len(found)} damaged, {total:,} bytes compared" if damaged else f"all whole, {total:,} bytes compared")
    return not damaged


def _run(path: Path) -> list[Checked]:
    """The checkpoints of a run, or those that the path names, and its config."""
    workdir, step = locate(path)
    if not (workdir / FOLDER).is_dir():
        return []
    found: list[Checked] = []
    config = workdir / CONFIG
    try:
        read_config(workdir)
        if path == workdir and f'"{OWN}"' in config.read_text():
            found.append(Checked(CONFIG, "config of a run", "1 file", config.stat().st_size))
    except UserError as error:
        found.append(Checked(CONFIG, "config of a run", "1 file", 0, (str(error),)))
    with Store(workdir, CheckpointConfig(), clean=False) as store:
        if step is not None and step not in store.steps:
            known = ", ".join(map(str, store.steps)) or "none"
            raise UserError(f"{path} is not a complete checkpoint; those of the run are {known}")
        for one in store.steps if step is None else [step]:
            seen = store.examine(one)
            count = counted(seen.arrays, "array") if seen.arrays or seen.faults else "has no checksums"
            found.append(Checked(f"{FOLDER}/{one}", "checkpoint", count, seen.bytes, tuple(seen.faults)))
    return found


def _manifests(path: Path) -> list[Path]:
    """Where manifests are, at or below a path, but for those within checkpoints; those that ought to be there count."""
    if path.is_file() or is_gguf(path):
        return [place for place in (manifest.next_to(path),) if place.is_file()]
    if path.parent.name == FOLDER or path.name == FOLDER:
        return []
    found = {place for place in path.rglob(f"*{manifest.NAME}") if not _in_checkpoint(place.relative_to(path))}
    for meta in path.rglob(records.META):
        if _says_checked(meta):
            found.add(meta.with_name(manifest.NAME))
    return sorted(found)


def _in_checkpoint(place: Path) -> bool:
    return any(part.startswith(FOLDER) for part in place.parts)


def _says_checked(meta: Path) -> bool:
    try:
        return bool(json.loads(meta.read_bytes()).get(records.CHECKED))
    except (ValueError, AttributeError):
        return True


def _manifest(place: Path, path: Path) -> Checked:
    what = place.relative_to(path).as_posix() if path.is_dir() else place.name
    try:
        found = manifest.read(place)
    except manifest.DamagedError as error:
        return Checked(what, "manifest", "", 0, (str(error),))
    faults = tuple(f"{name} {fault}" for name in found.files if (fault := found.fault(name)))
    return Checked(what, _kind(found), counted(len(found.files), "file"), found.bytes, faults)


def _kind(found: manifest.Manifest) -> str:
    kinds = {
        records.META: "prepared data",
        "weights.json": "loss weights",
        "curation.json": "curated data",
        "adapter_config.json": "adapter",
        "lcx_delta.json": "differences",
    }
    names = found.files.keys()
    known = next((kind for name, kind in kinds.items() if name in names), None)
    return known or ("model" if any(name.endswith((".safetensors", ".gguf")) for name in names) else "files")


def _update(place: Path) -> None:
    """Write a manifest anew, of what is there now of the files that it lists, and of new ones where it lists a whole folder."""
    whole = (
        place.name == manifest.NAME and not (place.parent / records.META).exists() and not (place.parent / "curation.json").exists()
    )
    try:
        names = [name for name in manifest.read(place).files if (place.parent / name).is_file()]
    except manifest.DamagedError:
        names = []
    if not whole and not names:
        raise UserError(f"{place} is damaged, and which files it was of is not known; write the folder again")
    before = place.read_bytes() if place.exists() else b""
    manifest.write(place.parent, manifest.listed(place.parent) if whole else names, place.name)
    if place.read_bytes() != before:
        say(f"{place} written anew")
