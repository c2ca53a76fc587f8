"""An adapter, or the differences that an extraction wrote, laid over another model of the same architecture, tensor by tensor."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lcx.core.configs import choice
from lcx.core.console import say, warn
from lcx.core.errors import UserError
from lcx.core.manifest import check_file
from lcx.interop import hf_config, peft
from lcx.interop.folder import check_folder, copy_companions, created, is_folder
from lcx.interop.peft import EMBEDDINGS, HEAD, RECORD, WEIGHTS
from lcx.interop.shards import DTYPES, Shards
from lcx.interop.weights import shape_text
from lcx.merging import models as checks
from lcx.merging.extract import DELTA, SPARSE
from lcx.merging.models import LENGTH, Model, config_text, with_rotary
from lcx.merging.stream import MAX_SHARD_BYTES, Work, stream
from lcx.merging.tensors import Reader, Rows, Tensor
from lcx.merging.writer import Stored

SIDES = ("delta", "target")

Change = Callable[[int, np.ndarray], np.ndarray]
"""From a first row and a target's rows `[rows, C]`, float32, to what is added to them."""


class Delta(Protocol):
    """What is laid over a model: `folder`, `about` for messages, the tensors that it changes, and the rotary settings of it."""

    folder: Path
    tuned: Mapping[str, Any] | None
    """config.json of the model that it turns its base into, if it is known."""
    base: Mapping[str, Any] | None
    """Rotary settings of its base."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape, of what it changes."""

    def change(self, name: str) -> Change:
        """The change of a tensor."""


class FullDelta:
    """Differences of all tensors."""

    def __init__(self, folder: Path, record: Mapping[str, Any]):
        self.folder, self.tuned, self.base = folder, record.get("config"), record.get("rotary", {}).get("base")
        self._reader = Reader(folder)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return dict(self._reader.shards.shapes)

    def change(self, name: str) -> Change:
        """The stored rows."""
        rows = self._reader.rows(name)
        return lambda start, target: rows(start, start + len(target))


class SparseDelta:
    """The largest differences of each tensor, as indices into it flattened, ascending, and values."""

    def __init__(self, folder: Path, record: Mapping[str, Any]):
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        self.folder, self.tuned, self.base = folder, record.get("config"), record.get("rotary", {}).get("base")
        check_file(folder / SPARSE)
        try:
            self._stored = load_file(folder / SPARSE)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / SPARSE} is not a complete safetensors file ({error}); extract it again") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor names; shapes are not stored, and empty here."""
        return {name.removesuffix(".indices"): () for name in self._stored if name.endswith(".indices")}

    def change(self, name: str) -> Change:
        """Zeros but for the stored entries."""
        indices, values = self._stored[f"{name}.indices"], self._stored[f"{name}.values"]
        if not np.isfinite(values).all():
            raise UserError(f"{self.folder / SPARSE}: {name} contains NaN or infinity; extract it again")

        def change(start: int, target: np.ndarray) -> np.ndarray:
            first, last = start * target.shape[1], (start + len(target)) * target.shape[1]
            own = slice(*np.searchsorted(indices, (first, last)))
            found = np.zeros(target.size, np.float32)
            found[indices[own] - first] = values[own]
            return found.reshape(target.shape)

        return change


class PeftDelta:
    """An adapter of peft's; what it saves whole counts as a difference to its base where that is at hand, else it replaces."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = peft.settings_of(folder)
        self._shards = Shards(folder, WEIGHTS)
        record = hf_config.read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
        self.tuned = hf_config.values_of(folder) if (folder / hf_config.FILE).is_file() else None
        named = Path(str(self.settings.get("base_model_name_or_path")))
        self._below = Reader(named) if is_folder(named) else None
        self.base = record.get("rotary", {}).get("base")
        if self.base is None and self._below is not None:
            self.base = hf_config.values_of(named)
        self._parts: dict[str, dict[str, str]] = {}
        for name in self._shards.shapes:
            match = peft.NAME.fullmatch(name)
            if match is None:
                raise UserError(f"{folder / WEIGHTS} has {name}, which lcx does not apply")
            self._parts.setdefault(match["module"], {})[match["what"]] = name
        self.replaces = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        found: dict[str, tuple[int, ...]] = {}
        shapes = self._shards.shapes
        for module, parts in self._parts.items():
            for what in ("weight", "bias"):
                if (own := parts.get(what) or parts.get(f"base_layer.{what}")) is not None:
                    found[f"{module}.{what}"] = shapes[own]
            if "lora_A.weight" in parts and "lora_B.weight" in parts:
                found[f"{module}.weight"] = (shapes[parts["lora_B.weight"]][0], shapes[parts["lora_A.weight"]][1])
            if "lora_embedding_A" in parts and "lora_embedding_B" in parts:
                found[f"{module}.weight"] = (shapes[parts["lora_embedding_A"]][1], shapes[parts["lora_embedding_B"]][0])
        return found

    def change(self, name: str) -> Change:
        """What is saved whole, less the base, and the product of the two matrices; under DoRA their sum is rescaled by row."""
        module, _, ending = name.rpartition(".")
        parts = self._parts[module]
        whole = self._whole(name, parts.get(ending) or parts.get(f"base_layer.{ending}"))
        if ending == "bias" or not any(what.startswith("lora_") for what in parts):
            assert whole is not None
            return whole
        read = {what: self._shards.read(own).astype(np.float32) for what, own in parts.items() if what.startswith("lora_")}
        if "lora_embedding_A" in read:
            read |= {"lora_B.weight": read["lora_embedding_A"].T, "lora_A.weight": read["lora_embedding_B"].T}
        rank = peft.of_pattern(self.settings["rank_pattern"], module, self.settings["r"])
        alpha = peft.of_pattern(self.settings["alpha_pattern"], module, self.settings["lora_alpha"])
        if read["lora_A.weight"].shape[0] != rank:
            stored = read["lora_A.weight"].shape[0]
            raise UserError(f"{self.folder}: {module} has rank {stored} in {WEIGHTS} but {rank} in {peft.CONFIG}; make them agree")
        scale = np.float32(alpha / (math.sqrt(rank) if self.settings["use_rslora"] else rank))
        magnitude = read.get("lora_magnitude_vector")

        def change(start: int, target: np.ndarray) -> np.ndarray:
            own = slice(start, start + len(target))
            added = scale * (read["lora_B.weight"][own] @ read["lora_A.weight"])
            if whole is not None:
                added += whole(start, target)
            if magnitude is None:
                return added
            kernel = target + added
            ratio = magnitude[own] / np.sqrt(np.square(kernel).sum(axis=1))
            return ratio[:, None] * kernel - target

        return change

    def _whole(self, name: str, stored: str | None) -> Change | None:
        """The change by a tensor that the adapter saves whole."""
        if stored is None:
            return None
        saved = self._shards.read(stored).astype(np.float32)
        saved = saved.reshape(-1, saved.shape[-1])
        below = None if self._below is None or name not in self._below.shards.shapes else self._below.rows(name)
        if below is None and name == f"{HEAD}.weight" and self._below is not None:
            below = self._below.rows(f"{EMBEDDINGS}.weight")
        if below is None:
            self.replaces = True
            return lambda start, target: saved[start : start + len(target)] - target
        return lambda start, target: saved[start : start + len(target)] - below(start, start + len(target))


def opened(folder: str | Path) -> Delta:
    """What `lcx extract` or peft wrote into a folder."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; name the folder that lcx extract wrote, or an adapter of peft's")
    check_folder(folder)
    if (folder / DELTA).is_file():
        record = hf_config.read_json(folder / DELTA)
        return SparseDelta(folder, record) if record.get("form") == "sparse" else FullDelta(folder, record)
    if peft.is_adapter(folder):
        return PeftDelta(folder)
    raise UserError(f"{folder} holds neither {DELTA} nor {peft.CONFIG}; name what lcx extract wrote, or an adapter of peft's")


@dataclasses.dataclass(frozen=True)
class _Named:
    """What `models.same_architecture` compares of a model that is not here."""

    name: str
    values: Mapping[str, Any]
    layers: int


class Application:
    """A delta and its target, checked. `weight` multiplies the change; `rotary` says whose positions the result has.

    Raises `UserError` for another architecture, vocabulary or shape, and where the target's rotary settings are neither those of
    the delta's base nor the tuned ones and `rotary` is None; `on_conflict` then is the way out, with the delta's settings for `{}`.
    """

    def __init__(
        self,
        delta: str,
        target: str,
        weight: float = 1.0,
        rotary: str | None = None,
        dtype: str | None = None,
        on_conflict: str = "say whose the result gets with --rotary=delta ({}) or --rotary=target",
    ):
        if not math.isfinite(weight) or not weight:
            raise UserError(f"--weight={weight} must be finite and not 0; 1 adds the change as it is")
        self.delta, self.target, self.weight = opened(delta), Model(target), weight
        self._dtype = None if dtype is None else choice("--dtype", dtype, tuple(DTYPES.values()))
        if self.delta.tuned is not None:
            known: Any = _Named(delta, self.delta.tuned, self.target.layers)
            checks.same_architecture([known, self.target], whole=True)
        checks.same_vocabulary(self.delta.folder, self.target.folder)
        self.values = self._with_rotary(rotary, on_conflict)
        self.shapes = self._checked(delta)

    def write(self, out: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Write the result as a new Hugging Face folder, which is there whole or not at all."""
        works = [self._work(name) for name in self.target.shapes]
        with created(out, sum(work.stored.bytes for work in works)) as part:
            stream(part, works, "apply", max_shard_bytes)
            copy_companions(self.target.folder, part, self.values.get(LENGTH, 0))
            (part / hf_config.FILE).write_text(config_text(self.values), encoding="utf-8")
        if getattr(self.delta, "replaces", False):
            warn(f"the base of {self.delta.folder} is not at hand, so what it saves whole replaced the target's own")
        say(f"applied {self.delta.folder} to {self.target.name}: {len(self.shapes)} of {len(works)} tensors changed; see {out}")

    def _work(self, name: str) -> Work:
        dtype = self._dtype or self.target.reader.shards.dtype(name)
        changes = name in self.shapes
        change = self.delta.change(name) if changes else None

        def make(tensor: Tensor, write: Callable[[int, np.ndarray], None]) -> None:
            def block(one: Any) -> None:
                rows = one.base
                if change is not None:
                    rows = rows + np.float32(self.weight) * change(one.start, rows)
                write(one.start, rows)

            collections.deque(tensor.over(block), maxlen=0)

        return Work(name, Stored(self.target.shapes[name], dtype), (), (self.target.reader, name), make)

    def _checked(self, delta: str) -> dict[str, tuple[int, ...]]:
        found = self.delta.shapes()
        if f"{HEAD}.weight" not in self.target.shapes and f"{EMBEDDINGS}.weight" in found:
            found.pop(f"{HEAD}.weight", None)  # one table for both
        for name, shape in found.items():
            there = self.target.shapes.get(name)
            if there is None or shape and shape != there:
                what = "missing" if there is None else shape_text(there)
                raise UserError(
                    f"{name} is {shape_text(shape)} in {delta} but {what} in {self.target.name}; they are of different models"
                )
        return found

    def _with_rotary(self, rotary: str | None, on_conflict: str) -> dict[str, Any]:
        """The target's config.json with the rotary settings that count."""
        values, tuned, base = dict(self.target.values), self.delta.tuned, self.delta.base
        if rotary is not None:
            choice("--rotary", rotary, SIDES)
        if tuned is None:
            if rotary == "delta":
                raise UserError(f"--rotary=delta: {self.delta.folder} does not say which rotary settings it was trained with")
            return values
        if rotary is None:
            known = [with_rotary(values, side) for side in (tuned, base) if side is not None]
            if not any(checks.same_rotary(values, one) for one in known):
                raise UserError(
                    f"{self.target.name} ({checks.rotary_text(values)}) has other rotary settings than the base of "
                    f"{self.delta.folder}; {on_conflict.format(checks.rotary_text(tuned))}"
                )
        return values if rotary == "target" else with_rotary(values, tuned)


class LaidOver(Reader):
    """The tensors of a model with a delta laid over it."""

    def __init__(self, laid: Application):
        super().__init__(laid.target.folder)
        self._laid = laid

    def rows(self, name: str) -> Rows:
        """Reads the rows of a tensor, and changes them."""
        below = super().rows(name)
        if name not in self._laid.shapes:
            return below
        change = self._laid.delta.change(name)

        def read(start: int, stop: int) -> np.ndarray:
            found = below(start, stop)
            return found + change(start, found)

        return read


def open_model(name: str) -> Model:
    """The model that a merge's file calls `name`: a folder, or FOLDER+DELTA, with an adapter or differences laid over it."""
    target, _, delta = name.rpartition("+")
    if not target or Path(name).expanduser().exists():
        return Model(name)
    laid = Application(str(Path(delta).expanduser()), target, on_conflict="`lcx apply` it first, which asks whose the result gets")
    model = laid.target
    model.name, model.values, model.reader = name, laid.values, LaidOver(laid)
    return model
