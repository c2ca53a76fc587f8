"""Writers of metrics: what one has the others have, and wrong lists of them."""

import json
import struct

import pytest

from lcx.core.errors import UserError
from lcx.core.extras import library
from lcx.training.metrics import KNOWN, MetricsConfig, place_of, read
from lcx.training.workdir import read_config
from lcx.training.writers import WRITERS, Writer, curves
from tests.training import tiny


def rows(steps):
    place = {"stage": "base", "stage_index": 0, "attempt": 0, "theta": None}
    return [
        {"step": n, **place, "stage_step": n, "loss": 4.0 / n, "loss_by_part": {"code": 0.5 * n}, "ok": True, "time": 9.0}
        for n in steps
    ]


def test_the_table_has_what_the_config_knows():
    assert tuple(WRITERS) == KNOWN and MetricsConfig().names == ["jsonl", "tensorboard"]
    assert MetricsConfig("jsonl, wandb").names == ["jsonl", "wandb"]


@pytest.mark.parametrize(
    "writers, answer",
    [
        ("jsonl,tensorbord", "metrics.writers='tensorbord' is unknown; did you mean 'tensorboard'"),
        ("tensorboard", "metrics.writers=tensorboard lacks jsonl, which reports and resuming read; add it"),
        ("jsonl,jsonl", "names jsonl twice"),
        ("", "metrics.writers='' is unknown"),
    ],
)
def test_wrong_lists(writers, answer):
    with pytest.raises(UserError, match=answer):
        MetricsConfig(writers)


def test_curves_are_the_numbers_of_a_row():
    assert dict(curves(rows([2])[0])) == {"loss": 2.0, "ok": True, "loss_by_part/code": 1.0}


def test_a_process_that_does_not_write_leaves_nothing(tmp_path):
    writer = Writer(tmp_path, MetricsConfig(), active=False)
    writer.write(rows([1])[0])
    writer.truncate(lambda row: False)
    writer.close()
    assert not list(tmp_path.iterdir())


def test_a_run_that_said_tensorboard_is_read_as_before(tmp_path):
    values = tiny.config(metrics={"tensorboard": True, "peak_flops": 1e11})
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path).metrics == MetricsConfig("jsonl,tensorboard", 1e11)
    (tmp_path / "config.json").write_text(json.dumps({**values, "metrics": {"tensorboard": False}}))
    assert read_config(tmp_path).metrics.names == ["jsonl"]


def test_without_its_library_a_writer_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match=r"metrics.writers=wandb needs the wandb library; install the extra"):
        Writer(tmp_path, MetricsConfig("jsonl,wandb"))


def test_weights_and_biases_has_what_the_jsonl_has(tmp_path, monkeypatch):
    """Offline, read back from its own file; a resumed run goes on under the same id."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    writer = Writer(tmp_path, MetricsConfig("jsonl,wandb"), settings={"seed": 3})
    for row in rows(range(1, 7)):
        writer.write(row)
    writer.close()
    name = (tmp_path / "wandb" / "run_id").read_text()
    resumed = Writer(tmp_path, MetricsConfig("jsonl,wandb"), settings={"seed": 3})
    resumed.truncate(lambda row: place_of(row) <= (0, 0, 4))
    for row in rows([5, 6, 7]):
        resumed.write(row)
    resumed.close()
    files = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{name}.wandb"), key=lambda path: path.stat().st_mtime_ns)
    logged = {row["step"]: row for path in files for row in history(path)}
    wanted = {row["step"]: {f"train/{key}": value for key, value in curves(row)} for row in read(tmp_path / "metrics.jsonl")}
    assert len(files) in (1, 2) and sorted(wanted) == list(range(1, 8))
    assert {step: {key: row[key] for key in wanted[step]} for step, row in logged.items()} == wanted


def history(path):
    """The rows that a file of wandb's holds: records in LevelDB's log format (7 bytes of header, blocks of 32 KiB)."""
    proto = library("wandb.proto.wandb_internal_pb2", "the test")
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            record = proto.Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                yield {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
