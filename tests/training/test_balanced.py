"""Rows that are dealt to devices by their documents: from the config to the loss, equal to one device, and resumed the same."""

import json

import jax
import numpy as np
import pytest
import tiny

from lcx.attention.parallel.documents import Documents
from lcx.core.errors import UserError
from lcx.training.builder import StageBuilder
from lcx.training.loop import train
from lcx.training.metrics import TIMING, read
from lcx.training.stages import run_config

LENGTH, ROWS = 512, 4


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Documents of a few dozen bytes to a few hundred."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("texts") / "short.jsonl"
    lengths = np.exp(rng.normal(3.5, 1.0, 400)).astype(int) + 2
    path.write_text("".join(json.dumps({"text": "".join(chr(97 + x) for x in rng.integers(0, 26, n))}) + "\n" for n in lengths))
    return str(path)


def run_of(texts, context, masked=True, ulysses=1, data=1, needles=0.2, length=LENGTH, **execution):
    source = {"kind": "jsonl", "path": texts}
    parts = {
        "text": {"weight": 1.0, "source": source, "packing": {"method": "best_fit", "mask_documents": masked}},
        "needles": {"kind": "multikey", "weight": needles, "source": source, "task": {"needles": 1, "queries": 1}},
    }
    stages = [{"name": "base", "seq_len": length, "steps": 6, "batch_size": ROWS, "accumulate": 2}]
    mesh = {"fsdp": 1, "context": context, "ulysses": ulysses, "data": data}
    return run_config(tiny.config(data={"parts": parts}, stages=stages, mesh=mesh, checkpoint={"every": 2}, execution=execution))


def built(texts, context, devices, **options):
    return StageBuilder(run_of(texts, context, **options), [], jax.devices()[:devices]).build(0)


def test_batches_hold_the_rows_of_the_loader_each_dealt_by_its_documents(texts):
    stage = built(texts, 8, 8, context_layout="balanced")
    batch, whole = jax.device_get(stage.batch(3)), stage.loader.batch(3)
    assert batch.layout == "balanced" and stage.layout == ""
    assert len({tuple(row) for row in batch.order.tolist()}) == ROWS
    for name in ("tokens", "targets", "loss_weights", "positions"):
        np.testing.assert_array_equal(np.take_along_axis(getattr(batch, name), np.argsort(batch.order, 1), 1), getattr(whole, name))
    for order, new, old in zip(batch.order, batch.segments, whole.segments, strict=True):
        pairs = set(zip(new.tolist(), old[order].tolist(), strict=True))  # one number for another, and padding is padding
        assert len(pairs) == len(set(new)) == len(set(old)) and all((one == 0) == (other == 0) for one, other in pairs)
    for order, reach, segments in zip(batch.order, batch.reach, whole.segments, strict=True):
        row, device = Documents.of(segments), np.empty(LENGTH, int)
        device[order] = np.arange(LENGTH) // (LENGTH // 8)
        for document, (begin, length) in enumerate(zip(row.starts, row.lengths, strict=True)):
            ring = set(reach[(order >= begin) & (order < begin + length)].tolist())
            wide = len({device[place] // max(ring) for place in range(begin, begin + length)})
            assert wide == 1 or row.segments[document] == 0


def test_the_layout_follows_the_documents_of_a_stage_and_says_why(texts):
    packed = built(texts, 8, 8, needles=0.0, length=4096)
    assert packed.step.balanced and packed.layout.startswith("balanced: attention over the documents of 4 rows takes")
    plain = built(texts, 8, 8, masked=False, needles=0.0, length=4096)
    assert not plain.step.balanced and plain.layout.startswith("zigzag: attention over the documents of 4 rows")
    assert plain.batch(0).layout == "zigzag" and plain.batch(0).reach is None
    asked = built(texts, 8, 8, context_layout="zigzag")
    assert not asked.step.balanced and asked.layout == ""


def test_a_ring_of_one_device_is_refused(texts):
    with pytest.raises(
        UserError, match="context_layout=balanced deals documents to the devices of a ring, but stages.base has mesh"
    ):
        built(texts, 2, 2, ulysses=2, context_layout="balanced")


def rows(workdir):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read(workdir / "metrics.jsonl")]


class Stopped(Exception):
    """What ends a run here."""


@pytest.mark.slow
@pytest.mark.parametrize(("context", "ulysses", "data"), [(8, 1, 1), (4, 2, 2)])
def test_a_run_equals_one_device_and_resumes_the_same(texts, context, ulysses, data, tmp_path):
    options = {"ulysses": ulysses, "data": data, "context_layout": "balanced"}
    alone = train(run_of(texts, 1), tmp_path / "one", jax.devices()[:1])
    whole = train(run_of(texts, context, **options), tmp_path / "whole", jax.devices()[:8])
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("one", "whole")]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(alone.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=1e-5)

    def stop(stage, step, state, batch):
        if step == 5:
            raise Stopped
        return batch

    with pytest.raises(Stopped):
        train(run_of(texts, context, **options), tmp_path / "cut", jax.devices()[:8], reweight=stop)
    again = train(run_of(texts, context, **options), tmp_path / "cut", jax.devices()[:8])
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
