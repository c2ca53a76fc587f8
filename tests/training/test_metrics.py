"""Rows, peaks, and a file that is cut back to where a run goes on."""

import jax
import pytest

from lcx.core.errors import UserError
from lcx.training.metrics import Meter, MetricsConfig, append, peak_flops, place_of, read, row
from lcx.training.writers import Writer

PLACE = {"step": 3, "stage": "a", "stage_index": 0, "attempt": 0, "stage_step": 3}


def test_a_row_is_plain_and_has_a_perplexity():
    metrics = {"loss": jax.numpy.float32(2.0), "ok": jax.numpy.bool_(True)}
    found = row(PLACE, metrics, Meter(1000, 1e9, 1e10).speed(0.5))
    assert found["perplexity"] == pytest.approx(7.389, rel=1e-3) and found["ok"] is True
    assert (found["tokens_per_second"], found["mfu"]) == (2000.0, 0.2)
    assert row(PLACE, {"loss": jax.numpy.float32("nan")}, {})["perplexity"] == float("inf")


def test_values_of_parts_have_their_names(tmp_path):
    by_part = {"loss_by_part": jax.numpy.array([1.5, jax.numpy.nan, 2.5]), "weight_by_part": jax.numpy.array([8.0, 0.0, 1.0])}
    found = row(PLACE, {"loss": jax.numpy.float32(2.0), **by_part}, {}, ("books", "code", "needles"))
    assert found["loss_by_part"] == {"books": 1.5, "needles": 2.5}
    assert found["weight_by_part"] == {"books": 8.0, "needles": 1.0}
    writer = Writer(tmp_path, MetricsConfig())
    writer.write(found)
    writer.close()
    assert read(tmp_path / "metrics.jsonl")[0]["loss_by_part"] == {"books": 1.5, "needles": 2.5}
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"train/loss_by_part/books" in events


def test_cut_back_to_the_restored_step(tmp_path):
    writer = Writer(tmp_path, MetricsConfig())
    for step in range(1, 6):
        writer.write({**PLACE, "step": step, "stage_step": step, "loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')
    assert len(read(path)) == 5
    writer.truncate(lambda entry: place_of(entry) <= (0, 0, 3))
    writer.close()
    assert [entry["step"] for entry in read(path)] == [1, 2, 3]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_full_disk_is_one_sentence():
    with pytest.raises(UserError, match="is full"):
        from pathlib import Path

        append(Path("/dev/full"), {"x": 1})


def test_peak():
    device = jax.devices()[0]
    assert peak_flops(device, 123.0) == 123.0
    assert peak_flops(device) > 1e8
