"""What a fine-tune adds to its base, as something to carry: a low-rank adapter in peft's files, or differences, whole or sparse.

Differences are taken in float32: rounded to bfloat16 they would lose what a context extension changes.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcx.core.console import Progress, say, table
from lcx.core.errors import UserError
from lcx.core.numbers import counted, size
from lcx.interop import hf_config, peft_save
from lcx.interop.families import ROPE_KEYS
from lcx.interop.folder import created, files_with_weights
from lcx.interop.peft import CONFIG, EMBEDDINGS, HEAD, PREFIX, RECORD, WEIGHTS
from lcx.interop.weights import shape_text
from lcx.merging import models as checks
from lcx.merging.models import LENGTH, Model, config_text
from lcx.merging.plan import kind
from lcx.merging.stream import Work, stream
from lcx.merging.writer import Stored

DELTA = "lcx_delta.json"
"""The file that marks a folder of differences; its tensors are in files like a model's."""

SPARSE = "sparse.safetensors"
TABLE = "extraction.json"
"""Rank, energy and error of each module of an extracted adapter."""


@dataclasses.dataclass(frozen=True)
class Extracted:
    """One module of an adapter: `energy` is the kept share of Σσ², `error` ‖Δ - BA‖ / ‖Δ‖ (Frobenius norms)."""

    module: str
    shape: tuple[int, int]
    rank: int
    energy: float
    error: float


class Extraction:
    """A base and its fine-tune. Raises `UserError` unless they are of one architecture, vocabulary and shape."""

    def __init__(self, base: str, tuned: str):
        self.base, self.tuned = Model(base), Model(tuned)
        checks.same_architecture([self.base, self.tuned], whole=True)
        checks.same_vocabulary(self.base.folder, self.tuned.folder)
        for name in self.base.shapes.keys() | self.tuned.shapes.keys():
            ours, theirs = self.base.shapes.get(name), self.tuned.shapes.get(name)
            if ours != theirs:
                one, other = ("missing" if shape is None else shape_text(shape) for shape in (ours, theirs))
                raise UserError(f"{name} is {one} in {base} but {other} in {tuned}; name a model and a fine-tune of it")

    def adapter(self, out: Path, rank: int | None, energy: float | None, embed: bool = False) -> list[Extracted]:
        """Write an adapter in peft's files, of `rank`, or of the least rank of each module that keeps a share `energy` of Σσ².

        Norms, biases and embeddings that differ are saved whole; with `embed` embeddings and output layer get adapters too. Returns
        what is in `extraction.json`.
        """
        if (rank is None) == (energy is None):
            raise UserError("give either --rank=R or --energy=SHARE, or --full or --sparse=SHARE for differences as they are")
        if rank is not None and rank < 1:
            raise UserError(f"--rank={rank} must be at least 1")
        if energy is not None and not 0 < energy <= 1:
            raise UserError(f"--energy={energy} must be a share above 0 and at most 1, such as 0.99")
        whole, thin = self._changed(embed)
        tensors: dict[str, np.ndarray] = {}
        found: list[Extracted] = []
        with Progress("extract", len(thin), every=None) as progress:
            for name in thin:
                module = name.removesuffix(".weight")
                delta = self._delta(name)
                one, factors = _factors(module, delta, rank, energy)
                found.append(one)
                tensors |= factors
                progress.advance()
        tensors |= self._whole(whole, [one.module for one in found])
        sizes = {one.module: (one.rank, float(one.rank)) for one in found}
        saved = {name.removesuffix(".weight") for name in whole if name.endswith(".weight")}
        settings = peft_save.as_config(sizes, saved, rank_stabilized=False, dora=False)
        settings["bias"] = "all" if any(name.endswith(".bias") for name in whole) else "none"
        settings["base_model_name_or_path"] = str(self.base.folder.absolute())
        if f"{PREFIX}{HEAD}.weight" in tensors and HEAD not in sizes and f"{HEAD}.weight" not in self.base.shapes:
            settings["ensure_weight_tying"] = True
        rows = [dataclasses.asdict(one) for one in found]
        with created(out, sum(x.nbytes for x in tensors.values())) as part:
            from safetensors.numpy import save_file

            save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, part / WEIGHTS, metadata={"format": "pt"})
            for name, content in ((CONFIG, settings), (RECORD, self._record()), (TABLE, rows)):
                text = json.dumps(content, indent=2, sort_keys=name == CONFIG)
                (part / name).write_text(text + "\n", encoding="utf-8")
            (part / hf_config.FILE).write_text(config_text(self.tuned.values), encoding="utf-8")
            self._companions(part)
        if rank is not None and (fewer := sum(one.rank < rank for one in found)):
            say(f"--rank={rank} is more than {fewer} of {counted(len(found), 'difference')} have; their adapters have their rank")
        written = size(sum(x.nbytes for x in tensors.values()))
        say(f"extracted {counted(len(found), 'module')} and {counted(len(whole), 'whole tensor')}, {written}, into {out}")
        return found

    def full(self, out: Path) -> None:
        """Write all differences in float32, tensor by tensor."""
        names = list(self.base.shapes)
        works = [
            Work(
                name, Stored(self.base.shapes[name], "float32"), ((self.tuned.reader, name),), (self.base.reader, name),
                lambda tensor, write: collections.deque(
                    tensor.over(lambda block: write(block.start, block.deltas()[0])), maxlen=0
                ),
            )
            for name in names
        ]  # fmt: skip
        needed = sum(work.stored.bytes for work in works)
        with created(out, needed) as part:
            stream(part, works, "extract")
            self._finish(part, {"form": "full"})
        say(f"extracted {len(names)} tensors, {size(needed)}, into {out}")

    def sparse(self, out: Path, share: float) -> None:
        """Write the largest differences of every tensor, a `share` of its numbers, as indices and values."""
        if not 0 < share <= 1:
            raise UserError(f"--sparse={share} must be a share of the numbers above 0 and at most 1, such as 0.1")
        numbers = sum(math.prod(shape) for shape in self.base.shapes.values())
        tensors: dict[str, np.ndarray] = {}
        kept = total = 0.0
        with created(out, math.ceil(numbers * share) * 12) as part, Progress("extract", len(self.base.shapes), every=None) as bar:
            for name in self.base.shapes:
                flat = self._delta(name).reshape(-1)
                indices = _largest(flat, math.ceil(share * flat.size))
                tensors |= {f"{name}.indices": indices.astype(np.int64), f"{name}.values": flat[indices]}
                kept, total = kept + float(np.square(flat[indices]).sum()), total + float(np.square(flat).sum())
                bar.advance()
            from safetensors.numpy import save_file

            save_file(tensors, part / SPARSE)
            self._finish(part, {"form": "sparse", "share": share})
        energy = kept / total if total else 1.0
        say(f"extracted {share:.1%} of {numbers:,} differences, {energy:.1%} of their energy, into {out}")

    def _finish(self, part: Path, record: Mapping[str, Any]) -> None:
        values = {**record, **self._record(), "config": self.tuned.values}
        (part / DELTA).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        self._companions(part)

    def _companions(self, part: Path) -> None:
        for path in files_with_weights(self.tuned.folder):
            shutil.copyfile(path, part / path.name)

    def _record(self) -> dict[str, Any]:
        """What `lcx apply` compares a target with: the rotary settings of both."""
        sides = {"base": self.base.values, "tuned": self.tuned.values}
        rotary = {name: {key: values[key] for key in (*ROPE_KEYS, LENGTH) if key in values} for name, values in sides.items()}
        return {"rotary": rotary}

    def _delta(self, name: str) -> np.ndarray:
        rows = math.prod(self.base.shapes[name][:-1])
        return self.tuned.reader.rows(name)(0, rows) - self.base.reader.rows(name)(0, rows)

    def _changed(self, embed: bool) -> tuple[list[str], list[str]]:
        """The tensors that are saved whole, and those that become adapters, of those that differ."""
        whole, thin = [], []
        for name, shape in self.base.shapes.items():
            module = name.removesuffix(".weight")
            if len(shape) == 2 and name.endswith(".weight") and (embed or module not in (EMBEDDINGS, HEAD)):
                if self._delta(name).any():
                    thin.append(name)
            else:
                whole.append(name)
        if not thin:
            raise UserError(f"no matrix of {self.tuned.name} differs from {self.base.name}; there is nothing to extract")
        if fused := next((name for name in thin if ".experts." in name or name.endswith((".gate.weight", ".router.weight"))), None):
            raise UserError(
                f"{fused} differs, and transformers stores experts in one tensor that peft does not name; extract with --full or "
                "--sparse"
            )
        if embed and f"{HEAD}.weight" not in self.base.shapes and f"{EMBEDDINGS}.weight" in thin:
            raise UserError(
                "--embed adapts a table of embeddings that is also the output layer, which peft leaves as it is; omit it"
            )
        # peft finds what is saved whole by the last part of a name, in all layers at once.
        differ = {_group(name) for name in whole if self._delta(name).any()}
        return [name for name in whole if _group(name) in differ], thin

    def _whole(self, names: Sequence[str], adapted: Sequence[str]) -> dict[str, np.ndarray]:
        found = {}
        for name in names:
            module, _, ending = name.rpartition(".")
            rows = math.prod(self.tuned.shapes[name][:-1])
            x = self.tuned.reader.rows(name)(0, rows).reshape(self.tuned.shapes[name])
            below = ".base_layer" if module in adapted else ""
            found[f"{PREFIX}{module}{below}.{ending}"] = x
            if module == EMBEDDINGS and f"{HEAD}.weight" not in self.base.shapes:
                found[f"{PREFIX}{HEAD}.{ending}"] = x
        for module in adapted:
            if module in (EMBEDDINGS, HEAD):
                rows = self.base.shapes[f"{module}.weight"][0]
                found[f"{PREFIX}{module}.base_layer.weight"] = self.base.reader.rows(f"{module}.weight")(0, rows)
        return found


def show(found: Sequence[Extracted]) -> None:
    """Print rank, energy and error by kind of module, over its layers."""
    groups: dict[str, list[Extracted]] = collections.defaultdict(list)
    for one in found:
        groups[kind(f"{one.module}.weight").removesuffix(".weight")].append(one)
    rows = []
    for name, members in groups.items():
        ranks, energies, errors = ([getattr(one, field) for one in members] for field in ("rank", "energy", "error"))
        shape = "x".join(map(str, members[0].shape))
        between = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        rows.append((name, len(members), shape, between, f"{np.mean(energies):.1%}", f"{np.mean(errors):.1%}"))
    table("what the adapter keeps (means over layers)", ("module", "number", "shape", "rank", "energy", "error"), rows)


def _factors(module: str, delta: np.ndarray, rank: int | None, energy: float | None) -> tuple[Extracted, dict[str, np.ndarray]]:
    """The two thin matrices of a difference `[out, in]` by its singular value decomposition: √Σ in each."""
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    square = np.square(s, dtype=np.float64)
    total = square.sum()
    real = int((s > s[0] * np.finfo(np.float32).eps).sum())
    if energy is not None:
        rank = int(np.searchsorted(np.cumsum(square), energy * total * (1 - 1e-12))) + 1
    r = max(1, min(int(rank or 1), real))
    root = np.sqrt(s[:r])
    kept = float(square[:r].sum() / total)
    one = Extracted(module, delta.shape, r, kept, math.sqrt(max(0.0, float(square[r:].sum() / total))))
    first, second = root[:, None] * v[:r], u[:, :r] * root
    if module == EMBEDDINGS:
        return one, {f"{PREFIX}{module}.lora_embedding_A": second.T, f"{PREFIX}{module}.lora_embedding_B": first.T}
    return one, {f"{PREFIX}{module}.lora_A.weight": first, f"{PREFIX}{module}.lora_B.weight": second}


def _largest(x: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest numbers by size, ascending."""
    distance = np.abs(x)
    if count >= x.size:
        return np.arange(x.size)
    return np.sort(np.argpartition(distance, x.size - count)[x.size - count :])


def _group(name: str) -> str:
    """What peft saves together: modules with one last name, and all biases."""
    return "bias" if name.endswith(".bias") else peft_save.last(name.removesuffix(".weight"))
