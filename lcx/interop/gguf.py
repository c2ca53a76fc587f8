"""Reading and writing of models as GGUF files, the format of llama.cpp: config, weights and tokenizer in one file (extra `gguf`).

Weights are read a few rows at a time and dequantised by the `gguf` library. A file says the same as a Hugging Face folder, so it is
turned into what `hf_config` and `weights` read: `gguf_config` translates its metadata, this module its tensors.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from lcx.core import gguf
from lcx.core.errors import UserError
from lcx.core.extras import library
from lcx.core.files import write_atomically
from lcx.core.gguf import Gguf, Place
from lcx.core.manifest import check_file
from lcx.core.quantized import Hold
from lcx.core.trees import Tree, paths
from lcx.data.tokenizers import gguf_vocab
from lcx.interop import gguf_config, hf_config, weights
from lcx.interop.families import FAMILIES
from lcx.interop.gguf_config import FREQS, LONG, SHORT, Arch
from lcx.interop.hf_config import Described
from lcx.interop.shards import finite
from lcx.model.config import ModelConfig
from lcx.model.params import specs
from lcx.positions.scheme import Scheme

TYPES = {"float32": ("F32", 0), "float16": ("F16", 1), "q8_0": ("Q8_0", 7), "bfloat16": ("BF16", 32)}
"""What weights can be written as -> its name in the `gguf` library and its number in `general.file_type`."""

_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""Types without blocks -> names in numpy."""

_LAYER = re.compile(r"(?P<hf>model\.layers\.)?(?P<gguf>blk\.)?(?P<layer>\d+)\.(?P<module>.+)\.(?P<end>weight|bias)")


class GgufModel:
    """A GGUF file, whose tensors are compared with what its metadata requires; split files by any of their parts.

    Raises `UserError` for architectures, tokenizers and types that lcx does not have, and for files that are damaged or incomplete.
    """

    def __init__(self, path: str | Path):
        self.folder = Path(path)
        self._found = gguf.read(path)
        self.described: Described = describe(path)
        self.tensors = Tensors(self._found)
        model = self.described.model
        self._specs = specs(model, self.described.schemes, self.described.length)
        self.slots = weights.slots(self._specs, self.described.family, model.num_layers)
        weights.check(self.tensors, self.slots, model.tied_embeddings, "metadata")

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return list(self._found.files)

    @property
    def dtype(self) -> str:
        """numpy's name of the narrowest dtype that holds all weights as they are: float32 for those with blocks."""
        matrices = {self.tensors.dtype(name) for name, shape in self.tensors.shapes.items() if len(shape) > 1}
        narrow = matrices.pop() if len(matrices) == 1 else "float32"
        if narrow not in ("bfloat16", "float16"):
            return "float32"
        vectors = (self.tensors.read(name) for name, shape in self.tensors.shapes.items() if len(shape) == 1)
        with np.errstate(over="ignore"):
            exact = all(np.array_equal(x.astype(narrow).astype(x.dtype), x) for x in vectors)
        return narrow if exact else "float32"

    def params(self, dtype: str | None = None, mesh: Mesh | None = None, hold: Hold | None = None) -> Tree:
        """The parameters in numpy's `dtype` (None: `self.dtype`) on `mesh` (None: the first device), each as `hold` makes it."""
        for file in self.files:
            check_file(file)
        return weights.load(self.tensors, self._specs, self.slots, dtype or self.dtype, mesh, hold)


def describe(path: str | Path) -> Described:
    """The model in a GGUF file; raises `UserError` if lcx cannot compute exactly that."""
    return hf_config.read(gguf_config.values(gguf.read(path)), str(path))


def files(path: str | Path) -> Path:
    """A folder with a GGUF file's config.json and tokenizer as Hugging Face's files (see `gguf_vocab.unpacked`)."""
    folder = gguf_vocab.unpacked(path)
    config = folder / hf_config.FILE
    if not config.exists():
        found = GgufModel(path)
        values = {
            "architectures": [found.described.family.architecture],
            **gguf_config.values(gguf.read(path)),
            "dtype": found.dtype,
        }
        write_atomically(config, json.dumps(values, indent=2) + "\n")
    return folder


class Tensors:
    """The tensors of a GGUF file under the names and in the form that Hugging Face has them; the form of `shards.Shards`."""

    def __init__(self, found: Gguf):
        self.folder, self._found, self._arch = found.path, found, gguf_config.arch(found)
        self._places: dict[str, Place] = {}
        for name, place in found.tensors.items():
            if name not in (FREQS, LONG, SHORT):
                self._places[_hf_name(name, self._arch)] = place
        metadata = gguf_config.Metadata(found)
        heads = metadata.needs("attention.head_count")
        self._heads = {"q_proj": heads, "k_proj": metadata.get("attention.head_count_kv", heads)}
        self._types = {name: _type(place, name) for name, place in self._places.items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return {name: place.shape for name, place in self._places.items()}

    def dtype(self, name: str) -> str:
        """numpy's name of the type in which a tensor is read."""
        if self._offset(name):
            return "float32"
        return _PLAIN.get(self._types[name], "float32")

    def read(self, name: str) -> np.ndarray:
        """A whole tensor; raises `UserError` if it contains a number that is not finite."""
        with self.open(name) as piece:
            return piece((slice(None),) * len(self.shapes[name]))

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Callable[[tuple[slice, ...]], np.ndarray]]:
        """Context manager for reading pieces of a tensor, dequantised; raises `UserError` for numbers that are not finite."""
        place, stored = self._places[name], self._places[name].open()
        rows = self._rows(name, place.shape[0])

        def piece(box: tuple[slice, ...]) -> np.ndarray:
            found = self._numbers(stored[box[0]] if rows is None else stored[rows[box[0]]], name)[(slice(None), *box[1:])]
            if offset := self._offset(name):
                found = found.astype(np.float32) - np.float32(offset)
            if not finite(found):
                raise UserError(f"{place.path}: {name} contains NaN or infinity; the file is broken, download it again")
            return found

        yield piece

    def _numbers(self, stored: np.ndarray, name: str) -> np.ndarray:
        kind = self._types[name]
        if kind == "BF16":
            return np.ascontiguousarray(stored).view(ml_dtypes.bfloat16)
        if kind in _PLAIN:
            return np.ascontiguousarray(stored)
        from gguf import GGMLQuantizationType, quants

        return quants.dequantize(np.ascontiguousarray(stored), GGMLQuantizationType[kind])

    def _offset(self, name: str) -> float:
        return self._arch.offset if name.endswith("norm.weight") else 0.0

    def _rows(self, name: str, count: int) -> np.ndarray | None:
        """Which row of the file each row of the tensor is, if their order differs."""
        module = name.split(".")[-2]
        if not self._arch.turned or module not in self._heads or count % (2 * self._heads[module]):
            return None
        return turned(count, self._heads[module])


def turned(rows: int, heads: int) -> np.ndarray:
    """Row of a GGUF file for each row of Hugging Face's query or key matrix, int `[rows]`, of a Llama.

    A pair of dims that rotate together is neighbours there and half a head apart here.
    """
    half = rows // heads // 2
    head, side, pair = np.meshgrid(np.arange(heads), np.arange(2), np.arange(half), indexing="ij")
    return (head * 2 * half + pair * 2 + side).reshape(-1)


def _hf_name(name: str, arch: Arch) -> str:
    """Hugging Face's name of a tensor; an unknown one keeps its own."""
    modules = {theirs: ours for ours, theirs in arch.tensors.items()}
    if found := _LAYER.fullmatch(name):
        # Two of Phi-3's modules have the name of one of Llama's; the table's later row is the family's.
        module = modules.get(found["module"])
        return f"model.layers.{found['layer']}.{module}.{found['end']}" if module and found["gguf"] else name
    module, _, end = name.rpartition(".")
    return f"{modules[module]}.{end}" if module in modules else name


def _gguf_name(name: str, arch: Arch) -> str:
    if found := _LAYER.fullmatch(name):
        return f"blk.{found['layer']}.{arch.tensors[found['module']]}.{found['end']}"
    module, _, end = name.rpartition(".")
    return f"{arch.tensors[module]}.{end}"


def _type(place: Place, name: str) -> str:
    """The library's name of a tensor's type; raises `UserError` if the library cannot turn it into numbers."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    kind = GGMLQuantizationType(place.kind)
    if kind.name not in _PLAIN:
        try:
            quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except (NotImplementedError, ValueError, KeyError) as error:
            raise UserError(
                f"{place.path}: {name} is stored as {kind.name}, which the gguf library does not dequantise; use another file"
            ) from error
    return kind.name


def save(
    out: Path,
    params: Tree,
    model: ModelConfig,
    schemes: Mapping[str, Scheme],
    length: int,
    kind: str,
    tokenizer: Path,
    base: Path | None = None,
) -> dict[str, Any]:
    """Write a model as a GGUF file for rows of up to `length` tokens; returns the config.json that says the same.

    `schemes` holds the scheme of each layer kind, `kind` is one of `TYPES`; norms and biases are float32, as llama.cpp reads them.
    `tokenizer` is a folder with the tokenizer's files, `base` that of the model it came from, whose config.json's other keys count.
    Raises `UserError` if `out` exists, and for what GGUF or llama.cpp cannot represent.
    """
    above = check_new(out)
    lib = library("gguf", str(out), "gguf")
    dtype = "float32" if kind == "q8_0" else kind
    values = hf_config.write(model, schemes, length, dtype, hf_config.values_of(base) if base else None)
    metadata, extra = gguf_config.metadata(values)
    arch = gguf_config.ARCHS[metadata["general.architecture"]]
    slots = weights.slots(specs(model, schemes, length), FAMILIES[values["model_type"]], model.num_layers)
    metadata |= {"general.name": gguf.stem(out), "general.file_type": TYPES[kind][1]}
    metadata |= {"general.quantization_version": lib.GGML_QUANT_VERSION} if kind == "q8_0" else {}
    metadata |= gguf_vocab.metadata(tokenizer, model.vocab_size)
    leaves = dict(paths(params))
    if jax.process_index() != 0:
        # One process writes; the others send it what they hold.
        for parts in slots.values():
            weights.tensor(leaves, parts, "float32")
        return values
    part = out.absolute().with_name(f".{out.name}.part")
    writer = lib.GGUFWriter(part, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        _add(lib, writer, key, value)
    for name, x in extra.items():
        writer.add_tensor_info(name, x.shape, x.dtype, x.nbytes, lib.GGMLQuantizationType.F32)
    forms = {name: _form(lib, parts[0].tensor_shape, kind) for name, parts in slots.items()}
    for name, parts in slots.items():
        shape, form = parts[0].tensor_shape, lib.GGMLQuantizationType[forms[name]]
        block, size = lib.GGML_QUANT_SIZES[form]
        writer.add_tensor_info(_gguf_name(name, arch), shape, np.float32, math.prod(shape) // block * size, form)
    try:
        needed = sum(info.nbytes for info in writer.tensors[0].values())
        if needed > (free := shutil.disk_usage(above).free):
            sizes = f"{needed / 1e9:,.1f} GB and the disk has {free / 1e9:,.1f} GB left"
            raise UserError(f"{out} needs {sizes}; free some space or choose another disk")
        part.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for x in extra.values():
            writer.write_tensor_data(x)
        for name, parts in slots.items():
            writer.write_tensor_data(_stored(lib, weights.tensor(leaves, parts, "float32"), name, arch, model, forms[name]))
        writer.close()
        os.replace(part, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}); free some space or choose another folder") from error
    finally:
        writer.close()
        part.unlink(missing_ok=True)
    return values


def check_new(out: Path) -> Path:
    """The existing folder in which a file will be created; raises `UserError` if it exists or cannot be created."""
    if not out.name.endswith(gguf.SUFFIX):
        raise UserError(f"--out={out} must end in {gguf.SUFFIX} to be written as GGUF")
    if out.exists():
        raise UserError(f"{out} already exists; choose a new name, or delete it first")
    above = next(path for path in out.absolute().parents if path.exists())
    if not above.is_dir():
        raise UserError(f"{out} cannot be created: {above} is a file; choose another folder")
    return above


def _form(lib: Any, shape: tuple[int, ...], kind: str) -> str:
    """The type of a tensor: vectors are float32, and rows that do not divide into blocks float16."""
    name = TYPES[kind][0]
    if len(shape) == 1:
        return "F32"
    return name if shape[-1] % lib.GGML_QUANT_SIZES[lib.GGMLQuantizationType[name]][0] == 0 else "F16"


def _stored(lib: Any, x: np.ndarray, name: str, arch: Arch, model: ModelConfig, form: str) -> np.ndarray:
    """A tensor of Hugging Face's, float32, as it lies in the file."""
    module = name.split(".")[-2]
    if arch.turned and module in ("q_proj", "k_proj"):
        order = turned(len(x), model.num_heads if module == "q_proj" else model.num_kv_heads)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        x = x[back]
    if arch.offset and name.endswith("norm.weight"):
        x = x + np.float32(arch.offset)
    if form == "BF16":
        return np.ascontiguousarray(x.astype(ml_dtypes.bfloat16)).view(np.uint8)
    if form == "F16":
        with np.errstate(over="ignore"):
            x = x.astype(np.float16)
        if not finite(x):
            raise UserError(f"{name} has numbers out of range for float16; choose another dtype")
        return np.ascontiguousarray(x)
    return np.ascontiguousarray(x if form == "F32" else lib.quants.quantize(x, lib.GGMLQuantizationType[form]))


def _add(lib: Any, writer: Any, key: str, value: Any) -> None:
    """Add a key with the type that llama.cpp expects."""
    kinds = lib.GGUFValueType
    if isinstance(value, list):
        if value and key.endswith("precompiled_charsmap"):
            writer.add_key_value(key, value, kinds.ARRAY, kinds.UINT8)
        elif value:
            writer.add_array(key, value)
        return
    kind = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}[type(value)]
    writer.add_key_value(key, value, kind)
