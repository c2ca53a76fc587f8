import gzip
import json
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lcx.core.errors import UserError
from lcx.data.config import DataConfig, PartConfig, SourceConfig
from lcx.data.loader import Corpus
from lcx.data.sources import documents, sources
from lcx.data.tokenizers import tokenizers

BYTES = tokenizers.load("bytes")


def whole(source, document):
    one = np.array([document])
    return source.gather(one, np.array([0]), np.array([source.lengths[document]]))


def texts(source):
    return [BYTES.decode(whole(source, i)) for i in range(len(source.lengths))]


def memory(*texts):
    tokens = [BYTES.encode(text) for text in texts]
    return sources.InMemorySource([f"d{i}" for i in range(len(texts))], tokens, [sources.text_hash(t.encode()) for t in texts], 256)


def test_text_files(tmp_path):
    (tmp_path / "b.txt").write_text("beta")
    (tmp_path / "a.txt").write_text("alpha é")
    (tmp_path / "c.txt").write_text("")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"delta"))
    source = sources.load(SourceConfig("text", (f"{tmp_path}/*.txt", f"{tmp_path}/*.gz", f"{tmp_path}/a.txt")), BYTES)
    assert texts(source) == ["alpha é", "beta", "delta"]
    assert source.lengths.tolist() == [8, 4, 5]


def test_jsonl(tmp_path):
    rows = [{"body": "one"}, {"body": ""}, {"body": "three"}]
    (tmp_path / "x.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert texts(sources.load(SourceConfig("jsonl", f"{tmp_path}/x.jsonl", field="body"), BYTES)) == ["one", "three"]
    with pytest.raises(UserError, match="did you mean 'body'"):
        sources.load(SourceConfig("jsonl", f"{tmp_path}/x.jsonl", field="bodi"), BYTES)
    (tmp_path / "y.jsonl").write_text('{"text": "a"}\n{broken')
    with pytest.raises(UserError, match=r"y.jsonl:2 is not valid JSON"):
        sources.load(SourceConfig("jsonl", f"{tmp_path}/y.jsonl"), BYTES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (gzip.compress(b"long" * 99)[:20], "cannot be read"),
    ],
    ids=["git_lfs_pointer", "broken_gzip"],
)
def test_files_that_only_look_like_text_are_named(tmp_path, content, message):
    (tmp_path / "x.txt.gz").write_bytes(content)
    with pytest.raises(UserError, match=f"x.txt.gz {message}"):
        sources.load(SourceConfig("text", f"{tmp_path}/x.txt.gz"), BYTES)


def test_a_mistake_in_one_source_is_found_before_another_is_read(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text('{"body": "one"}')
    parts = {
        "first": PartConfig(source=SourceConfig("stdlib")),
        "second": PartConfig(source=SourceConfig("jsonl", f"{tmp_path}/x.jsonl")),
    }
    monkeypatch.setattr(sources, "load", lambda *_: pytest.fail("a source was read"))
    with pytest.raises(UserError, match=r"x.jsonl:1 has no text under source.field='text'; allowed: body"):
        Corpus(DataConfig(parts=parts))


def test_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None, "three"], "n": [1, 2, 3]}), tmp_path / "x.parquet")
    assert texts(sources.load(SourceConfig("parquet", f"{tmp_path}/*.parquet"), BYTES)) == ["one", "three"]
    with pytest.raises(UserError, match="no column"):
        sources.load(SourceConfig("parquet", f"{tmp_path}/*.parquet", field="nope"), BYTES)
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read as a Parquet file"):
        sources.load(SourceConfig("parquet", f"{tmp_path}/bad.parquet"), BYTES)


TINY = """
import sys
import tensorflow_datasets as tfds

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(5):
            yield i, {"text": f"document {i}"}

Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


def test_tfds_without_tensorflow(tmp_path):
    subprocess.run([sys.executable, "-c", TINY, str(tmp_path)], check=True, capture_output=True)
    source = sources.load(SourceConfig("tfds", "tiny", data_dir=str(tmp_path)), BYTES)
    assert sorted(texts(source)) == [f"document {i}" for i in range(5)]
    assert "tensorflow" not in sys.modules
    with pytest.raises(UserError, match="no feature"):
        sources.load(SourceConfig("tfds", "tiny", field="nope", data_dir=str(tmp_path)), BYTES)
    with pytest.raises(UserError, match="cannot be opened"):
        sources.load(SourceConfig("tfds", "absent", data_dir=str(tmp_path)), BYTES)


def test_standard_library():
    names = [name for name, _ in documents.read(SourceConfig())]
    assert names == sorted(names)
    assert "argparse.py" in names
    assert "json/" in names
    assert not any(name.startswith("test/") for name in names)
    package = dict(documents.read(SourceConfig(limit_bytes=None)))["json/"]
    assert b"class JSONEncoder" in package
    assert b"class JSONDecoder" in package
    few = list(documents.read(SourceConfig(limit_bytes=100_000)))
    total = sum(len(text) for _, text in few)
    assert total >= 100_000
    assert total - len(few[-1][1]) < 100_000


def test_missing_and_empty(tmp_path):
    with pytest.raises(UserError, match="matches no file"):
        sources.load(SourceConfig("text", f"{tmp_path}/*.txt"), BYTES)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="has no text"):
        sources.load(SourceConfig("text", f"{tmp_path}/*.txt"), BYTES)


def test_end_of_sequence(tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    config = SourceConfig("text", f"{tmp_path}/a.txt", append_eos=True)
    source = sources.load(config, tokenizers.load("bytes+eos"))
    assert whole(source, 0).tolist() == [97, 98, 256]
    with pytest.raises(UserError, match=r"bytes\+eos"):
        sources.load(config, BYTES)


def test_windows_and_gather_against_slices():
    rng = np.random.default_rng(0)
    source = memory(*("".join(rng.choice(list("abc"), n)) for n in (5, 1, 9, 2, 7)))
    chosen = sources.Subset(source, np.array([3, 0, 4, 1]))
    stream = np.concatenate([whole(source, i) for i in (3, 0, 4, 1)])
    assert chosen.num_tokens == len(stream)
    for length in range(1, len(stream) + 1):
        starts = np.arange(len(stream) - length + 1)
        expected = np.stack([stream[start : start + length] for start in starts])
        np.testing.assert_array_equal(chosen.windows(starts, length), expected)


def test_split_is_disjoint_by_text_and_stable():
    many = [f"document number {i}" for i in range(400)]
    every = [*many, *many[:50]]
    source = memory(*every)
    train, held = sources.split(source, 0.2, "train"), sources.split(source, 0.2, "heldout")
    assert sorted([*train.ids, *held.ids]) == list(range(450))
    assert not {every[i] for i in train.ids} & {every[i] for i in held.ids}
    assert 0.12 < len(held.ids) / 450 < 0.28
    held_fewer = {many[100:300][i] for i in sources.split(memory(*many[100:300]), 0.2, "heldout").ids}
    assert held_fewer == {every[i] for i in held.ids} & set(many[100:300])


def test_split_of_small_corpora():
    assert len(sources.split(memory("one", "two"), 0.01, "heldout").ids) == 1
    assert len(sources.split(memory("one", "two"), 0.99, "train").ids) == 1
    assert len(sources.split(memory("one", "two"), 0.0, "train").ids) == 2
    with pytest.raises(UserError, match="heldout side"):
        sources.split(memory("one", "two"), 0.0, "heldout")
    with pytest.raises(UserError, match="heldout side"):
        sources.split(memory("same", "same", "same"), 0.01, "heldout")


def test_length_filter():
    chosen = sources.split(memory("a" * 3, "b" * 10, "c" * 30), 0.0, "train")
    assert sources.lengths_between(chosen, 4, 20).lengths.tolist() == [10]
    with pytest.raises(UserError, match="the longest has 30"):
        sources.lengths_between(chosen, 31, None)
