"""The files of a prepared dataset: ArrayRecord shards of `tf.train.Example` messages, in the layout that TFDS reads.

    folder/dataset_info.json, features.json      what `tfds.builder_from_directory(folder)` needs
    folder/<name>-train.array_record-00000       documents 0, 1, ...: features `name` (text) and `tokens` (raw bytes of a vector)
    folder/index/00000.npz                       lengths, text hashes, names and checksums of that shard's documents; the shard's
                                                 commit mark
    folder/checksums.json                        sizes and checksums of all other files
    folder/lcx.json                              tokenizer fingerprint, source, counts, and whether the dataset is complete

An `Example` is encoded and decoded by hand here: its bytes must be the same in every run, which protobuf does not guarantee for
maps, and reading must not need TensorFlow. Wire format: https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import io
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from lcx.core.files import write_atomically

META = "lcx.json"
CHECKED = "checksums"
"""Key of it, and of the metadata of loss weights, that says that there is a manifest."""


def shard_path(folder: pathlib.Path, name: str, shard: int) -> pathlib.Path:
    """Path of a shard's documents."""
    return folder / f"{name}-train.array_record-{shard:05d}"


def index_path(folder: pathlib.Path, shard: int) -> pathlib.Path:
    """Path of a shard's index."""
    return folder / "index" / f"{shard:05d}.npz"


def write_index(
    path: pathlib.Path, names: Sequence[str], lengths: Sequence[int], hashes: Sequence[int], sums: Sequence[int]
) -> None:
    """Writes one shard's index, atomically."""
    content = io.BytesIO()
    words = np.frombuffer(json.dumps(list(names)).encode(), np.uint8)
    integers = {name: np.asarray(values, np.uint64) for name, values in (("hashes", hashes), ("sums", sums))}
    np.savez(content, lengths=np.asarray(lengths, np.int64), names=words, **integers)
    write_atomically(path, content.getvalue())


def read_index(path: pathlib.Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(names, lengths int64, hashes uint64) of a shard."""
    with np.load(path) as index:
        return json.loads(index["names"].tobytes()), index["lengths"], index["hashes"]


def read_sums(path: pathlib.Path) -> np.ndarray | None:
    """Checksums uint64 of the tokens of a shard's documents (`checksum`); None in a dataset from before they were kept."""
    with np.load(path) as index:
        return index.get("sums")


def checksum(tokens: np.ndarray) -> int:
    """XXH3 (64 bits) of a document's tokens as they are stored."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens).view(np.uint8).data)


def encode_example(features: Mapping[str, bytes]) -> bytes:
    """A `tf.train.Example` with one bytes value per feature, in the order of the mapping."""
    entries = (_field(1, _field(1, key.encode()) + _field(2, _field(1, _field(1, value)))) for key, value in features.items())
    return _field(1, b"".join(entries))


def decode_example(message: bytes) -> dict[str, bytes]:
    """The one bytes value of each feature of a `tf.train.Example`."""
    (features,) = (value for number, value in _fields(memoryview(message)) if number == 1)
    out = {}
    for _, entry in _fields(features):
        parts = dict(_fields(entry))
        (values,) = (value for _, value in _fields(parts[2]))
        out[bytes(parts[1]).decode()] = bytes(next(value for _, value in _fields(values)))
    return out


def tfds_files(name: str, shard_lengths: Sequence[int], num_bytes: int, dtype: np.dtype) -> dict[str, Any]:
    """Contents of the JSON files from which TFDS learns the shards and their features."""
    tensor = {"dtype": np.dtype(dtype).name, "encoding": "bytes", "shape": {"dimensions": ["-1"]}}
    core = "tensorflow_datasets.core.features"
    features = {
        "name": {"pythonClassName": f"{core}.text_feature.Text", "text": {}},
        "tokens": {"pythonClassName": f"{core}.tensor_feature.Tensor", "tensor": tensor},
    }
    split = {
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
        "name": "train",
        "numBytes": str(num_bytes),
        "shardLengths": [str(length) for length in shard_lengths],
    }
    return {
        "dataset_info.json": {"fileFormat": "array_record", "name": name, "splits": [split], "version": "1.0.0"},
        "features.json": {"featuresDict": {"features": features}, "pythonClassName": f"{core}.features_dict.FeaturesDict"},
    }


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited field."""
    size, varint = len(payload), bytearray()
    while size > 127:
        varint.append(size & 127 | 128)
        size >>= 7
    varint.append(size)
    return bytes([number << 3 | 2]) + bytes(varint) + payload


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 != 2:
            raise ValueError(f"field {tag >> 3} of a prepared record is not length-delimited")
        size, at = _varint(message, at)
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
