"""Some columns of rows are those of the whole rows, and nothing but them is read."""

import dataclasses

import numpy as np
import pytest

from lcx.attention.parallel.documents import Documents
from lcx.data import packing
from lcx.data.config import DataConfig, PackingConfig, PartConfig, SourceConfig, TaskConfig
from lcx.data.loader import Loader
from lcx.data.sources.sources import InMemorySource, Subset

LENGTH = 64
ZIGZAG = np.concatenate([np.arange(8, 16), np.arange(48, 56)])
SHARES = {
    "first": np.arange(0, 16),
    "last": np.arange(48, 64),
    "zigzag": ZIGZAG,
    "striped": np.arange(3, 64, 4),
    "one": np.array([17]),
    "dealt": np.concatenate([np.arange(56, 64), np.arange(0, 8)]),
}


class Counted(Subset):
    """A subset that counts the tokens that are read of it."""

    read = 0

    def gather(self, documents, starts, ends):
        self.read += int((ends - starts).sum())
        return super().gather(documents, starts, ends)


def source():
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 40, 60)
    lengths[::10] = 150
    tokens = [rng.integers(1, 200, n) for n in lengths]
    weights = [rng.random(n).astype(np.float32) for n in lengths]
    made = InMemorySource([str(i) for i in range(60)], tokens, np.arange(60), 256, weights)
    return Counted(made, np.arange(60))


@pytest.mark.parametrize("method", ["concat_then_split", "best_fit"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("shared_bos", [True, False])
def test_columns_of_packed_rows(method, masked, reset, shared_bos):
    documents = source()
    config = PackingConfig(method=method, mask_documents=masked, reset_positions=reset, shared_bos=shared_bos)
    plan = packing.plan(method, documents.lengths, LENGTH - shared_bos, np.random.default_rng(0))
    rows = np.array([3, 0, len(plan) - 1, 3])
    whole = packing.assemble(plan, rows, documents, LENGTH, config, 255)
    for name, columns in SHARES.items():
        documents.read = 0
        part = packing.assemble(plan, rows, documents, LENGTH, config, 255, columns)
        assert part.keys() == whole.keys()
        for key, x in part.items():
            assert x.dtype == whole[key].dtype
            np.testing.assert_array_equal(x, whole[key][:, columns], err_msg=f"{name}: {key}")
        if name != "striped":
            runs = 1 + np.count_nonzero(np.diff(columns) != 1)
            # A run's own tokens, the one behind it, and the one that follows it in its document.
            assert documents.read <= len(rows) * (len(columns) + 2 * runs)


def test_columns_of_a_batch():
    text = SourceConfig(kind="stdlib", limit_bytes=100_000)
    task = TaskConfig(needles=1, queries=1)
    parts = {
        "text": PartConfig(weight=0.4, source=text),
        "skipping": PartConfig(weight=0.3, source=text, remap="pose"),
        "needles": PartConfig(kind="multikey", weight=0.3, source=text, task=task),
    }
    loader = Loader(DataConfig(parts=parts), LENGTH, 8, seed=1, max_position=256)
    for step in range(2):
        whole = loader.batch(step)
        assert len(set(whole.row_parts.tolist())) > 1
        for columns in SHARES.values():
            part = loader.batch(step, slice(2, 7), columns)
            for field in dataclasses.fields(whole):
                x, y = getattr(whole, field.name), getattr(part, field.name)
                if isinstance(x, np.ndarray):
                    np.testing.assert_array_equal(y, x[2:7] if x.ndim == 1 else x[2:7][:, columns], err_msg=field.name)


@pytest.mark.parametrize("method", ["concat_then_split", "best_fit"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shared_bos", [True, False])
def test_documents_of_rows_are_those_of_their_segments(method, masked, shared_bos):
    texts = source()
    config = PackingConfig(method=method, mask_documents=masked, shared_bos=shared_bos)
    plan = packing.plan(method, texts.lengths, LENGTH - shared_bos, np.random.default_rng(0))
    whole = packing.assemble(plan, np.arange(len(plan)), texts, LENGTH, config, 255)
    texts.read = 0
    for row in range(len(plan)):
        found, wanted = packing.documents(plan, row, LENGTH, config), Documents.of(whole["segments"][row])
        assert found.lengths.tolist() == wanted.lengths.tolist() and found.segments.tolist() == wanted.segments.tolist()
    assert texts.read == 0


def test_columns_that_differ_from_row_to_row():
    text = SourceConfig(kind="stdlib", limit_bytes=100_000)
    parts = {
        "text": PartConfig(weight=0.5, source=text, packing=PackingConfig(mask_documents=True)),
        "needles": PartConfig(kind="multikey", weight=0.5, source=text, task=TaskConfig(needles=1, queries=1)),
    }
    loader = Loader(DataConfig(parts=parts), LENGTH, 6, seed=1)
    whole, rng = loader.batch(1), np.random.default_rng(0)
    columns = np.stack([rng.permutation(LENGTH)[:40] for _ in range(6)])
    part = loader.batch(1, slice(1, 5), columns[1:5])
    assert len(set(whole.row_parts.tolist())) > 1
    for field in dataclasses.fields(whole):
        x, y = getattr(whole, field.name), getattr(part, field.name)
        if isinstance(x, np.ndarray):
            np.testing.assert_array_equal(y, x[1:5] if x.ndim == 1 else np.take_along_axis(x, columns, 1)[1:5], err_msg=field.name)
    for row, segments in zip(loader.documents(1), whole.segments, strict=True):
        assert row.lengths.tolist() == Documents.of(segments).lengths.tolist()
