"""Models that a config names as the YAML file of a merge: merged once, into a folder beside the file."""

from __future__ import annotations

from pathlib import Path

from lcx.core import processes
from lcx.core.errors import UserError
from lcx.interop.folder import CARD
from lcx.merging.merge import Merge

SUFFIXES = (".yml", ".yaml")


def merged(source: str | Path) -> Path:
    """`source` as it is, or the folder of the merge that a YAML file describes: beside the file, under its name.

    The folder is written first if it does not exist. Raises `UserError` if it holds the merge of another text.
    """
    path = Path(source).expanduser()
    if path.suffix not in SUFFIXES or not path.is_file():
        return path
    folder = path.with_suffix("")
    if not folder.exists() and processes.is_first():
        Merge(path).write(folder)
    processes.meet("merge")
    card = folder / CARD
    if not card.is_file() or path.read_text(encoding="utf-8-sig").strip() not in card.read_text(encoding="utf-8"):
        raise UserError(f"{folder} is not the merge that {path} describes; delete or rename the folder to have it merged anew")
    return folder
