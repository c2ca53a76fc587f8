"""Reading and writing of a complete Hugging Face model folder: config.json, weights, and the files next to them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lcx.core import manifest, processes
from lcx.core.errors import UserError
from lcx.core.quantized import Hold
from lcx.core.trees import Tree, paths
from lcx.interop import hf_config as configs
from lcx.interop import weights
from lcx.interop.families import FAMILIES
from lcx.interop.hf_config import Described
from lcx.interop.shards import Shards, write
from lcx.model.config import ModelConfig
from lcx.model.params import specs
from lcx.positions.scheme import Scheme

MAX_SHARD_BYTES = 2 << 30
"""Maximum size of an exported file, which is how much memory writing takes in addition to the model."""

_COMPANIONS = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template", "generation_config")
_COMPANION_ENDS = (".json", ".model", ".txt", ".jinja", ".tiktoken")

CARD = "README.md"
"""File of a model card."""

_FOR_PEOPLE = (".md", ".png")

_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


class HfFolder:
    """A folder with a config.json and safetensors files, whose tensors are compared with what the config requires.

    Raises `UserError` for anything that lcx would not compute exactly, and for files that do not match each other.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        check_folder(self.folder)
        self.described: Described = configs.read_file(self.folder)
        self.shards = Shards(self.folder)
        model = self.described.model
        self._specs = specs(model, self.described.schemes, self.described.length)
        self.slots = weights.slots(self._specs, self.described.family, model.num_layers)
        weights.check(self.shards, self.slots, model.tied_embeddings)

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return self.shards.files

    @property
    def dtype(self) -> str:
        """numpy's name of the dtype of the stored weights (the embedding's)."""
        return self.shards.dtype(f"{self.described.family.names['embed']}.weight")

    def params(self, dtype: str | None = None, mesh: Mesh | None = None, hold: Hold | None = None) -> Tree:
        """The parameters in numpy's `dtype` (None: as stored) on `mesh` (None: the first device), each as `hold` makes it."""
        self._check_weights()
        return weights.load(self.shards, self._specs, self.slots, dtype or self.dtype, mesh, hold)

    def _check_weights(self) -> None:
        """Compare the files of weights with the manifest, each in one of the processes."""
        fault: UserError | None = None
        try:
            self.shards.check(jax.process_index(), jax.process_count())
        except UserError as error:
            fault = error
        if any(processes.exchange("weights are damaged", fault is not None)):
            fault = fault or UserError(f"{self.folder} is damaged, as another process has found")
        if fault is not None:
            raise fault


def check_folder(folder: Path) -> None:
    """Raises `DamagedError` for a file that is not as the folder's manifest, if there is one, says.

    Of weights only sizes count here. Cards and pictures may be changed at will.
    """
    if (folder / manifest.NAME).is_file():
        found = manifest.read(folder / manifest.NAME)
        for name in found.files:
            if not name.endswith(_FOR_PEOPLE) and not name.upper().startswith(_LICENCES):
                found.check(name, least=name.endswith(".safetensors"))


def is_folder(path: str | Path) -> bool:
    """Whether a folder looks like a Hugging Face model's."""
    folder = Path(path)
    if not (folder / configs.FILE).is_file() or (folder / "checkpoints").exists():
        return False
    try:
        # The config.json of a run has stages.
        return "stages" not in configs.values_of(folder)
    except UserError:
        return True


def files_with_weights(folder: Path) -> list[Path]:
    """The files next to the weights that are needed with them: tokenizer, chat template, generation settings."""
    found = (path for path in folder.iterdir() if path.name.startswith(_COMPANIONS) and path.suffix in _COMPANION_ENDS)
    return sorted(path for path in found if path.is_file())


def tokenizer_files(folder: Path) -> list[Path]:
    """The files next to the weights that contain the tokenizer itself."""
    own = ("tokenizer.json", "tokenizer.model")
    return [path for path in files_with_weights(folder) if path.name in own or path.suffix in (".model", ".tiktoken")]


def terms(folder: Path) -> list[Path]:
    """The model card of a folder and its licence files."""
    found = (path for path in folder.iterdir() if path.name == CARD or path.name.upper().startswith(_LICENCES))
    return sorted(path for path in found if path.is_file())


def keep(folder: Path, into: Path) -> None:
    """Copy to `into` what an export needs from a model's folder: everything except the weights."""
    part = new_part(into)
    for path in (folder / configs.FILE, *files_with_weights(folder), *terms(folder)):
        shutil.copyfile(path, part / path.name)
    manifest.write(part)
    os.replace(part, into)


def copy_companions(folder: Path, into: Path, length: int) -> None:
    """Copy the files next to the weights for a model of up to `length` tokens."""
    for path in files_with_weights(folder):
        shutil.copyfile(path, into / path.name)
    raise_tokenizer_length(into, length)


def raise_tokenizer_length(folder: Path, length: int) -> None:
    """Let a tokenizer_config.json that declares fewer tokens declare `length`: transformers cuts texts there if asked to."""
    path = folder / "tokenizer_config.json"
    values = configs.read_json(path) if path.exists() else {}
    if isinstance(declared := values.get("model_max_length"), int | float) and declared < length:
        path.write_text(json.dumps({**values, "model_max_length": length}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save(
    out: Path,
    params: Tree,
    model: ModelConfig,
    schemes: Mapping[str, Scheme],
    length: int,
    dtype: str,
    base: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> dict[str, Any]:
    """Write a model as a Hugging Face folder, for rows of up to `length` tokens; returns its config.json.

    `schemes` holds the scheme of each layer kind. `base` is the folder that the model came from, or a copy by `keep`: its
    config.json's other keys, tokenizer, chat template and generation settings are kept; without it `bos_id` and `eos_id` are the
    tokenizer's. Raises `UserError` if `out` already exists, and for what Hugging Face cannot represent.
    """
    check_new(out)
    values = configs.write(model, schemes, length, dtype, configs.values_of(base) if base else None, bos_id, eos_id)
    slots = weights.slots(specs(model, schemes, length), FAMILIES[values["model_type"]], model.num_layers)
    leaves = dict(paths(params))
    if jax.process_index() != 0:
        # One process writes; the others send it what they hold.
        for parts in slots.values():
            weights.tensor(leaves, parts, dtype)
        return values
    size = jnp.dtype(dtype).itemsize
    sizes = {name: size * math.prod(parts[0].tensor_shape) for name, parts in slots.items()}
    with created(out, sum(sizes.values())) as part:
        write(part, sizes, lambda name: weights.tensor(leaves, slots[name], dtype), max_shard_bytes)
        if base:
            copy_companions(base, part, length)
        (part / configs.FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return values


@contextlib.contextmanager
def created(out: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder to write in, which gets a manifest and becomes `out` at the end of the body, and is removed if that raises.

    What a killed process left of one is removed by the next. Raises `UserError` if `out` exists or cannot be created, and for a
    disk with fewer than `needed_bytes` left.
    """
    check_new(out)
    part = new_part(out)
    try:
        refuse_full_disk(out, needed_bytes)
        yield part
        manifest.write(part)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def refuse_full_disk(out: Path, needed_bytes: int) -> None:
    """Raises `UserError` if `out` exists, cannot be created, or lies on a disk with fewer than `needed_bytes` left."""
    if needed_bytes > (free := shutil.disk_usage(check_new(out)).free):
        needed = f"{needed_bytes / 1e9:,.1f} GB and the disk has {free / 1e9:,.1f} GB left"
        raise UserError(f"{out} needs {needed}; free some space or choose another disk")


def check_new(out: Path) -> Path:
    """The existing folder in which a new one will be created; raises `UserError` if `out` exists or cannot be created."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists; choose a new folder, or delete it first")
    above = next(path for path in out.absolute().parents if path.exists())
    if not above.is_dir():
        raise UserError(f"{out} cannot be created: {above} is a file; choose another folder")
    return above


def new_part(out: Path) -> Path:
    """An empty folder next to `out` that replaces it when complete, so that an unfinished one is never mistaken for a model."""
    part = out.absolute().with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out} cannot be created ({error.strerror}); choose another folder") from error
    return part
