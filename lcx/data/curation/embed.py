"""A document as one vector of length 1: how alike two documents are is their vectors' product.

Embedders with one interface, from the user's own vectors down to hashed words, of which `auto` takes the first that is there. A
long document is read in pieces, and its vector is the mean over all of it. A mean over tokens does not see their order; hashed
vectors count pairs of neighbours too. Legend: D documents, E embedding dimensions, V tokens or buckets, W words.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lcx.core.configs import choice, positive
from lcx.core.errors import UserError
from lcx.core.extras import library
from lcx.core.files import refuse_lfs_pointer
from lcx.data.curation import words

KINDS = ("auto", "vectors", "static", "wordllama", "hidden", "hashed")
PIECE_CHARS = 4096
"""Characters that a tokenizer gets at once."""
PIECES = 256
"""Pieces on their way at once."""


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
    """Which vectors stand for documents.

    | `kind` | |
    |---|---|
    | `vectors` | the user's: `path` is an .npz with `names` and `vectors` [D, E], or an .npy beside a .txt with a name a line |
    | `static` | the mean of the tokens' vectors in the folder `path` (model2vec: model.safetensors, tokenizer.json) |
    | `wordllama` | the same with the two files of the package wordllama, if it is installed |
    | `hidden` | the mean hidden state of `model`: a workdir, a Hugging Face folder or a GGUF file |
    | `hashed` | TF-IDF of words and pairs of words in 2^16 buckets, projected at random to `dim` (256) numbers (arXiv:0902.2206) |
    | `auto` | the first of these that is there: `path` or `model`, wordllama, hashed |
    """

    kind: str = "auto"
    path: str = ""
    model: str = ""
    dim: int | None = None

    def __post_init__(self) -> None:
        choice("embedding.kind", self.kind, KINDS)
        positive("embedding", dim=self.dim)
        if self.path and self.model:
            raise UserError(
                f"embedding.path={self.path!r} and embedding.model={self.model!r} are two kinds of vectors; leave one out"
            )
        for field, kinds in (("path", ("vectors", "static")), ("model", ("hidden",)), ("dim", ("hashed",))):
            value = getattr(self, field)
            if value and self.kind not in (*kinds, "auto"):
                raise UserError(f"embedding.{field}={value!r} is not used by embedding.kind={self.kind!r}; leave it out")
            if not value and self.kind in kinds and field != "dim":
                raise UserError(f"embedding.kind={self.kind!r} needs embedding.{field}; name it")


class Embedder(Protocol):
    """Texts to vectors. `kind` is one of `KINDS`; `fingerprint` changes with whatever changes a vector."""

    kind: str
    fingerprint: str

    def __call__(self, texts: Sequence[str], names: Sequence[str] = ()) -> np.ndarray:
        """Vectors float32 `[D, E]` of length 1; zeros where there is nothing to embed, NaN where a vector is missing."""
        ...


@runtime_checkable
class Fitted(Protocol):
    """An embedder that weighs what it sees by how rare it is in a corpus."""

    def fit(self, texts: Iterable[str]) -> Embedder:
        """The embedder for this corpus."""
        ...


EmbedderFactory = Callable[[EmbedConfig], Embedder]


def build_embedder(config: EmbedConfig, factories: Mapping[str, EmbedderFactory] | None = None) -> Embedder:
    """The embedder; `factories` has that of `hidden`. Raises `UserError` for one that is not there."""
    factories, kind = factories or {}, config.kind
    if kind == "auto":
        if config.path:
            kind = "vectors" if config.path.endswith((".npy", ".npz")) else "static"
        elif not config.model and importlib.util.find_spec("wordllama") is not None:
            kind = "wordllama"
        else:
            kind = "hidden" if config.model else "hashed"
    if config.dim is not None and kind != "hashed":
        raise UserError(f"embedding.dim={config.dim} is that of hashed vectors, but these are {kind}; leave it out or use 'hashed'")
    if kind == "vectors":
        return Vectors.load(config.path)
    if kind == "static":
        return Static.load(config.path)
    if kind == "wordllama":
        return _wordllama()
    if kind == "hidden":
        if kind not in factories:
            raise UserError(
                f"embedding.model={config.model!r} needs a caller that runs models; lcx data curate does, or use 'hashed'"
            )
        return factories[kind](config)
    return Hashed(config.dim or 256)


def fitted(embedder: Embedder, texts: Iterable[str]) -> Embedder:
    """The embedder, weighed by a corpus if it is one that weighs."""
    return embedder.fit(texts) if isinstance(embedder, Fitted) else embedder


def normalised(rows: np.ndarray) -> np.ndarray:
    """Rows `[D, E]` at length 1, float32; zeros stay."""
    rows = np.asarray(rows, np.float64)
    lengths = np.sqrt((rows * rows).sum(1, keepdims=True))
    return (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)


class Vectors:
    """Vectors that the user has made, by name of the document."""

    kind = "vectors"

    def __init__(self, names: Sequence[str], vectors_DE: np.ndarray, digest: str) -> None:
        self._places = {name: i for i, name in enumerate(names)}
        self._vectors_DE, self.fingerprint = vectors_DE, f"vectors:{digest}"

    @classmethod
    def load(cls, path: str) -> Vectors:
        """Read a file, as `EmbedConfig` says; raises `UserError` for one that does not hold a vector for each name."""
        file = pathlib.Path(path).expanduser()
        listed = file.with_suffix(".txt")
        try:
            refuse_lfs_pointer(file)
            read = np.load(file, allow_pickle=False)
            if file.suffix == ".npz":
                names, vectors = read["names"].tolist(), read["vectors"]
            else:
                names, vectors = listed.read_text().splitlines(), read
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"embedding.path={path!r} cannot be read ({error}); it takes .npz with names and vectors") from error
        if vectors.ndim != 2 or len(vectors) != len(names) or vectors.dtype.kind != "f":
            raise UserError(f"embedding.path={path!r} has {len(names)} names for {vectors.dtype}{vectors.shape}; give a row a name")
        if len(set(names)) < len(names):
            raise UserError(f"embedding.path={path!r} has names twice; give each document one row")
        digest = hashlib.blake2b("\0".join(map(str, names)).encode("utf-8", "surrogatepass"), digest_size=8)
        digest.update(np.ascontiguousarray(vectors).tobytes())
        return cls(names, normalised(vectors), digest.hexdigest())

    def __call__(self, texts: Sequence[str], names: Sequence[str] = ()) -> np.ndarray:
        """The vectors of some names, NaN for one that the file does not have."""
        if len(names) != len(texts):
            raise UserError(
                "vectors from a file belong to names of documents, and texts have none here; name them or embed otherwise"
            )
        found = np.full((len(texts), self._vectors_DE.shape[1]), np.nan, np.float32)
        for i, name in enumerate(names):
            if (place := self._places.get(name)) is not None:
                found[i] = self._vectors_DE[place]
        return found


class Static:
    """The mean of fixed vectors of tokens: of model2vec's and wordllama's files, read without these packages."""

    def __init__(self, kind: str, tokenizer: Any, table_VE: np.ndarray, ignored: int | None, digest: str) -> None:
        self.kind, self.fingerprint = kind, f"{kind}:{digest}"
        self._tokenizer, self._table_VE, self._ignored = tokenizer, table_VE, ignored

    @classmethod
    def load(cls, path: str) -> Static:
        """A folder with model.safetensors and tokenizer.json; raises `UserError` if it is not one."""
        folder = pathlib.Path(path).expanduser()
        tensors, tokenizer, digest = _static_files(folder / "model.safetensors", folder / "tokenizer.json")
        table = tensors.get("embeddings", tensors.get("embedding.weight"))
        if table is None:
            raise UserError(
                f"{folder / 'model.safetensors'} has no tensor 'embeddings' or 'embedding.weight'; give a model2vec folder"
            )
        if "mapping" in tensors:
            table = table[tensors["mapping"].astype(np.int64)]
        table = table.astype(np.float32)
        if "weights" in tensors:
            table = table * tensors["weights"].astype(np.float32)[:, None]
        if tokenizer.get_vocab_size() > len(table):
            raise UserError(f"{folder}: {tokenizer.get_vocab_size()} tokens have {len(table)} vectors; give files of one model")
        unknown = json.loads((folder / "tokenizer.json").read_text())["model"].get("unk_token")
        return cls("static", tokenizer, table, None if unknown is None else tokenizer.token_to_id(unknown), digest)

    def __call__(self, texts: Sequence[str], names: Sequence[str] = ()) -> np.ndarray:
        """Mean vectors of the tokens."""
        counts: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in texts]
        for owners, batch in _batches(texts):
            for owner, encoding in zip(owners, self._tokenizer.encode_batch(batch, add_special_tokens=False), strict=True):
                ids, often = np.unique(np.array(encoding.ids, np.int64), return_counts=True)
                stays = ids != self._ignored
                counts[owner].append((ids[stays], often[stays]))
        found = np.zeros((len(texts), self._table_VE.shape[1]))
        for i, parts in enumerate(counts):
            for ids, often in parts:
                found[i] += often @ self._table_VE[ids].astype(np.float64)
        return normalised(found)


class Hashed:
    """TF-IDF of hashed words and pairs of neighbouring words, projected at random.

    Of a bucket with count c in a document, and in df of the n documents that it was fitted to, the weight is
    (1 + ln c) · (ln((1 + n) / (1 + df)) + 1); without a fit the second factor is 1. A row of signs for each bucket projects it.
    """

    kind = "hashed"
    BUCKETS = 1 << 16
    FIT_DOCUMENTS = 20_000
    """Documents of a corpus that it is fitted to, from its start."""

    def __init__(self, dim: int, idf_V: np.ndarray | None = None) -> None:
        self.fingerprint = f"hashed:{dim}"
        self._dim, self._idf_V = dim, np.ones(self.BUCKETS) if idf_V is None else idf_V
        self._signs_VE = np.random.Generator(np.random.PCG64(907)).integers(0, 2, (self.BUCKETS, dim), np.int8) * np.int8(
            2
        ) - np.int8(1)

    def fit(self, texts: Iterable[str]) -> Hashed:
        """The same with weights from the first documents of a corpus."""
        df, n = np.zeros(self.BUCKETS, np.int64), 0
        for text in texts:
            df[self.counts(text) > 0] += 1
            n += 1
            if n == self.FIT_DOCUMENTS:
                break
        return Hashed(self._dim, np.log((1 + n) / (1 + df)) + 1)

    def counts(self, text: str) -> np.ndarray:
        """How often each bucket occurs, int64 `[V]`."""
        found = np.zeros(self.BUCKETS, np.int64)
        before = np.zeros(0, np.uint64)
        for piece in pieces(text, 1 << 20):
            hashes_W = words.split(piece).hashes
            keys = np.concatenate([hashes_W, words.ngrams(np.concatenate([before, hashes_W]), 2)])
            found += np.bincount((words.mix(keys) % np.uint64(self.BUCKETS)).astype(np.int64), minlength=self.BUCKETS)
            before = hashes_W[-1:] if len(hashes_W) else before
        return found

    def __call__(self, texts: Sequence[str], names: Sequence[str] = ()) -> np.ndarray:
        """Projected weights."""
        found = np.zeros((len(texts), self._dim))
        for i, text in enumerate(texts):
            counts = self.counts(text)
            there = np.flatnonzero(counts)
            weights = (1 + np.log(counts[there])) * self._idf_V[there]
            found[i] = weights.astype(np.float32) @ self._signs_VE[there].astype(np.float32)
        return normalised(found)


def pieces(text: str, most: int) -> Iterator[str]:
    """The text in pieces of at most `most` characters, cut behind white space where there is some."""
    at = 0
    while at < len(text):
        end = min(len(text), at + most)
        if end < len(text):
            cut = max(text.rfind(" ", at + most // 2, end), text.rfind("\n", at + most // 2, end))
            end = cut + 1 if cut >= 0 else end
        yield text[at:end]
        at = end


def _batches(texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    """Pieces of all texts, so many at a time, each with the number of its text."""
    owners, batch = [], []
    for i, text in enumerate(texts):
        for piece in pieces(text, PIECE_CHARS):
            owners.append(i)
            batch.append(piece)
            if len(batch) == PIECES:
                yield owners, batch
                owners, batch = [], []
    if batch:
        yield owners, batch


def _wordllama() -> Static:
    spec = importlib.util.find_spec("wordllama")
    if spec is None or spec.origin is None:
        raise UserError("embedding.kind='wordllama' needs the package; pip install wordllama, or use 'hashed'")
    folder = pathlib.Path(spec.origin).parent
    files = folder / "weights" / "l2_supercat_256.safetensors", folder / "tokenizers" / "l2_supercat_tokenizer_config.json"
    tensors, tokenizer, digest = _static_files(*files)
    return Static("wordllama", tokenizer, tensors["embedding.weight"].astype(np.float32), None, digest)


def _static_files(weights: pathlib.Path, tokenizer: pathlib.Path) -> tuple[dict[str, np.ndarray], Any, str]:
    safetensors = library("safetensors.numpy", f"{weights}", "data")
    tokenizers = library("tokenizers", f"{tokenizer}", "data")
    try:
        refuse_lfs_pointer(weights)
        content = weights.read_bytes()
        words_of = tokenizers.Tokenizer.from_file(str(tokenizer))
        tensors = safetensors.load(content)
    except OSError as error:
        raise UserError(
            f"{error.filename or weights} cannot be read; name a folder with model.safetensors and tokenizer.json"
        ) from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{weights} and {tokenizer.name} cannot be read ({error}); name a folder that model2vec wrote") from error
    words_of.no_truncation()
    words_of.no_padding()
    return tensors, words_of, hashlib.blake2b(content + tokenizer.read_bytes(), digest_size=8).hexdigest()
