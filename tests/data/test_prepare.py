import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lcx.core.configs import build
from lcx.core.errors import UserError
from lcx.data.config import DataConfig, SourceConfig
from lcx.data.loader import Loader
from lcx.data.sources import records, sources
from lcx.data.sources.prepare import prepare
from lcx.data.tokenizers import tokenizers

CODE = SourceConfig(limit_bytes=1_500_000)
SHARD = 100_000

SLOW = """
import sys, time
from lcx.data.config import SourceConfig
from lcx.data.sources.prepare import prepare

def report(progress):
    print(progress.shards, flush=True)
    time.sleep(0.15)

prepare(SourceConfig(limit_bytes=1_500_000), "bytes", sys.argv[1], shard_tokens=100_000, report=report)
"""


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    done = prepare(CODE, "bytes", folder, shard_tokens=SHARD)
    return folder, done


def test_killed_in_the_middle_it_ends_with_the_same_bytes(tmp_path, prepared):
    folder, done = prepared
    for shards in (1, 3):
        process = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        while int(process.stdout.readline()) < shards:
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
        assert not json.loads((tmp_path / records.META).read_text())["complete"]
        with pytest.raises(UserError, match="unfinished"):
            sources.load(SourceConfig("array_record", str(tmp_path)), tokenizers.load("bytes"))
    committed = len(list((tmp_path / "index").glob("*.npz")))
    assert 3 <= committed < done.shards
    # What a kill between any two writes may leave behind.
    (tmp_path / "writing.partial").write_bytes(b"half a shard")
    records.shard_path(tmp_path, "lcx", committed).write_bytes(b"a shard without its index")
    (tmp_path / "index" / f"{committed:05d}.npz.partial").write_bytes(b"half an index")
    again = prepare(CODE, "bytes", tmp_path, shard_tokens=SHARD)
    assert again == done
    assert contents(tmp_path) == contents(folder)


def test_a_second_run_changes_nothing(prepared):
    folder, done = prepared
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert prepare(CODE, "bytes", folder, shard_tokens=SHARD) == done
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_tokens_names_lengths_and_split_equal_the_source(prepared):
    folder, done = prepared
    bytes_ = tokenizers.load("bytes")
    direct, stored = sources.load(CODE, bytes_), sources.load(SourceConfig("array_record", str(folder)), bytes_)
    assert done.documents == len(direct.names)
    assert done.tokens == direct.lengths.sum()
    assert stored.names == direct.names
    np.testing.assert_array_equal(stored.lengths, direct.lengths)
    np.testing.assert_array_equal(stored.hashes, direct.hashes)
    rng = np.random.default_rng(0)
    which = rng.integers(0, len(direct.names), 50)
    starts = (rng.random(50) * direct.lengths[which]).astype(int)
    ends = np.minimum(starts + rng.integers(1, 500, 50), direct.lengths[which])
    np.testing.assert_array_equal(stored.gather(which, starts, ends), direct.gather(which, starts, ends))


def test_tfds_reads_it_without_tensorflow(prepared):
    folder, done = prepared
    rows = tfds.builder_from_directory(str(folder)).as_data_source("train")
    direct = sources.load(CODE, tokenizers.load("bytes"))
    assert len(rows) == done.documents
    for i in (0, len(rows) // 2, len(rows) - 1):
        assert rows[i]["name"].decode() == direct.names[i]
        whole = direct.gather(np.array([i]), np.array([0]), direct.lengths[[i]])
        np.testing.assert_array_equal(rows[i]["tokens"], whole)


def test_a_loader_gives_the_same_batches_over_both(prepared):
    folder, _ = prepared
    batches = []
    for source in ({"kind": "stdlib", "limit_bytes": 1_500_000}, {"kind": "array_record", "path": str(folder)}):
        values = {"parts": {"a": {"source": source}, "b": {"kind": "multikey", "source": source}}}
        batches.append(Loader(build(DataConfig, values), 256, 4, seed=1).batch(3))
    np.testing.assert_array_equal(batches[0].tokens, batches[1].tokens)
    np.testing.assert_array_equal(batches[0].loss_weights, batches[1].loss_weights)


def test_larger_vocabularies_and_end_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    source = SourceConfig("text", f"{tmp_path}/a.txt", append_eos=True)
    prepare(source, "bytes+eos", tmp_path / "out")
    stored = sources.load(SourceConfig("array_record", str(tmp_path / "out"), append_eos=True), tokenizers.load("bytes+eos"))
    assert stored.gather(np.array([0]), np.array([3]), np.array([6])).tolist() == [ord("l"), ord("o"), 256]


def test_example_messages():
    features = {"name": b"x" * 200, "tokens": bytes(range(256)) * 90}
    assert records.decode_example(records.encode_example(features)) == features
    assert records.decode_example(records.encode_example({"empty": b""})) == {"empty": b""}


def test_what_cannot_go_on_says_so(tmp_path, prepared):
    folder, _ = prepared
    with pytest.raises(UserError, match="another dataset"):
        prepare(CODE, "bytes+eos", folder, shard_tokens=SHARD)
    with pytest.raises(UserError, match="made with tokenizer"):
        sources.load(SourceConfig("array_record", str(folder)), tokenizers.load("bytes+bos"))
    with pytest.raises(UserError, match="append_eos"):
        sources.load(SourceConfig("array_record", str(folder), append_eos=True), tokenizers.load("bytes"))
    with pytest.raises(UserError, match="matches no file"):
        prepare(SourceConfig("text", f"{tmp_path}/none/*"), "bytes", tmp_path / "out")
    with pytest.raises(UserError, match="cannot be written"):
        prepare(CODE, "bytes", os.devnull)


def test_a_corpus_that_changed_in_between(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 10)
    source, out = SourceConfig("text", f"{tmp_path}/*.txt"), tmp_path / "out"

    class Stop(Exception):
        pass

    def stop(progress):
        if progress.shards == 2:
            raise Stop

    with pytest.raises(Stop):
        prepare(source, "bytes", out, shard_tokens=5, report=stop)
    (tmp_path / "b.txt").write_text("changed")
    with pytest.raises(UserError, match="b.txt has changed"):
        prepare(source, "bytes", out, shard_tokens=5)
    (tmp_path / "b.txt").unlink()
    (tmp_path / "c.txt").unlink()
    with pytest.raises(UserError, match="more documents than the corpus"):
        prepare(source, "bytes", out, shard_tokens=5)


def test_a_full_disk_leaves_what_was_committed(tmp_path):
    """A file-size limit stands in for a full disk: the writes fail in the same place."""
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from lcx.core.errors import UserError\n"
        "from lcx.data.config import SourceConfig\n"
        "from lcx.data.sources.prepare import prepare\n"
        "def report(progress):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    prepare(SourceConfig(limit_bytes=1_500_000), 'bytes', sys.argv[1], shard_tokens=100_000, report=report)\n"
        "except UserError as error:\n"
        "    sys.exit(str(error))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "cannot be written" in ended.stderr
    assert len(list((tmp_path / "index").glob("*.npz"))) == 1
    assert prepare(CODE, "bytes", tmp_path, shard_tokens=SHARD).shards > 1
