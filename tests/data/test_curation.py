"""The whole curation: what stays, what the report says, and the same bytes however it is run."""

import dataclasses
import gzip
import json
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lcx.cli.main import main
from lcx.core.configs import build
from lcx.core.errors import UserError
from lcx.data.config import SourceConfig
from lcx.data.curation import shard
from lcx.data.curation.config import CuratedSource, CurationConfig, DecontaminateConfig, curated, defaults
from lcx.data.curation.pipeline import curate
from lcx.data.curation.settings import LengthSettings, MinHashSettings
from lcx.data.curation.workers import ordered
from lcx.data.sources.prepare import prepare
from lcx.data.sources.sources import load
from lcx.data.tokenizers import tokenizers
from tests.data import slow_curation
from tests.quick import mostly_slow

WORDS = np.array([f"{a}{b}{c}{d}" for a in "bdfgklm" for b in "aeiou" for c in "nprst" for d in "aeiou"])


def prose(rng, count):
    tokens = rng.choice(WORDS, count).tolist()
    return "\n".join(" ".join(tokens[i : i + 10]) + "." for i in range(0, count, 10))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(folder, source):
    return [json.loads(line) for path in sorted((folder / source).glob("*.jsonl")) for line in path.read_bytes().splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three sources with everything that can be dropped, and the config that curates them."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    secret = " ".join(rng.choice(WORDS, 20))
    (folder / "test.jsonl").write_text(json.dumps({"question": secret}))
    books = [prose(rng, 1200) for _ in range(24)]
    books[5] = books[1].upper().replace("\n", "  ")
    books[7] = books[2].replace(books[2].split()[40], "changed", 1)
    books[9] = f"{books[9]}\n{secret}"
    for i, book in enumerate(books):
        (folder / f"book{i:02d}.txt").write_text(book)
    (folder / "book90.txt").write_bytes(b"\xff\xfe latin")
    (folder / "book91.txt").write_bytes(b"zero \0 byte")
    pages = [json.dumps({"body": prose(rng, 300)}) for _ in range(40)]
    pages[3] = json.dumps({"body": books[3]})
    pages[4] = json.dumps({"body": prose(rng, 20)})
    pages[6:6] = ['{"body": "bro', "[1]", '{"boby": "x"}', '{"body": 5}', "", '{"body": "\\ud800 half a character"}']
    (folder / "pages.jsonl.gz").write_bytes(gzip.compress("\n".join(pages).encode()))
    (folder / "torn.jsonl.gz").write_bytes(gzip.compress(b"long" * 99)[:20])
    table = pyarrow.table({"text": [prose(rng, 300 + 10 * i) for i in range(20)] + [None, ""]})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    quality = {"min_stop_words": None}
    config = CurationConfig(
        sources={
            "books": source("text", f"{folder}/book*.txt", gopher_quality=quality),
            "pages": source("jsonl", f"{folder}/*.jsonl.gz", field="body", gopher_quality=quality),
            "rows": source("parquet", f"{folder}/rows.parquet", gopher_quality=quality, length={"min_bytes": 1900}),
        },
        order=("pages", "books", "rows"),
        decontaminate=DecontaminateConfig(f"{folder}/test.jsonl"),
        shard_bytes=15_000,
    )
    return config


def source(kind, path, field="text", **filters):
    values = curated("web", source={"kind": kind, "path": path, "field": field}, **filters)
    return build(CuratedSource, values.to_dict(), "source")


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """The corpus curated by one process."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    return folder, curate(corpus, folder)


def test_what_stays_and_what_is_dropped(finished):
    folder, report = finished
    assert report == json.loads((folder / "report.json").read_text())
    books, pages, parquet = (report["sources"][name] for name in ("books", "pages", "rows"))
    assert books["read"]["documents"] == 26 and books["kept"]["documents"] == 24 - 4
    reasons = {stage: found["reasons"] for stage, found in books["dropped"].items() if found["documents"]}
    assert reasons == {
        "read": {"not_utf8": 1, "zero_bytes": 1},
        "decontaminate": {"shares_ngram": 1},
        "exact": {"duplicate": 2},
        "minhash": {"duplicate": 1},
    }
    by_name = {sample["name"].split("/")[-1]: sample for sample in books["dropped"]["exact"]["samples"]}
    assert by_name["book05.txt"]["duplicate_of"].endswith("book01.txt")
    assert by_name["book03.txt"]["duplicate_of"].endswith("pages.jsonl.gz:4")  # an earlier source in `order`
    (near,) = books["dropped"]["minhash"]["samples"]
    assert near["name"].endswith("book07.txt") and near["duplicate_of"].endswith("book02.txt")
    expected = {"broken_line": 1, "not_an_object": 1, "no_field": 1, "not_text": 1, "not_utf8": 1, "unreadable_file": 1}
    assert pages["dropped"]["read"]["reasons"] == expected
    assert pages["dropped"]["gopher_quality"]["reasons"] == {"too_few_words": 1}
    assert pages["kept"]["documents"] == 39
    assert 0 < parquet["dropped"]["length"]["reasons"]["too_short"] < 20
    assert report["evaluation"] == {"texts": 1, "ngrams": 8, "texts_too_short": 0}
    for name, of in report["sources"].items():
        dropped = sum(stage["documents"] for stage in of["dropped"].values())
        assert of["read"]["documents"] == dropped + of["kept"]["documents"]
        found = rows(folder, name)
        assert len(found) == of["kept"]["documents"] and sum(len(row["text"].encode()) for row in found) == of["kept"]["bytes"]
        assert all(row["source"] == name and row["bytes"] == len(row["text"].encode()) for row in found)
        assert len(list((folder / name).glob("*.jsonl"))) > 2
    kept = [row["name"].split("/")[-1] for row in rows(folder, "books")]
    assert kept == sorted(kept) and not {"book05.txt", "book07.txt", "book09.txt", "book03.txt"} & set(kept)
    assert not (folder / "work").exists()


def test_lengths_are_those_of_what_was_read_and_of_what_stays(corpus, finished):
    folder, report = finished
    for name, of in report["sources"].items():
        edges, read, kept = (of["lengths"][key] for key in ("edges", "read", "kept"))
        sizes = [row["bytes"] for row in rows(folder, name)]
        for i, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            inside = [size for size in sizes if low <= size < high]
            assert (kept["documents"][i], kept["bytes"][i]) == (len(inside), sum(inside))
        assert sum(kept["documents"]) == len(sizes)
        assert {what: sum(counts) for what, counts in read.items()} == of["read"]
    paths = [Path(path) for path in sorted(Path(corpus.sources["books"].source.path).parent.glob("book*.txt"))]
    edges, read = report["sources"]["books"]["lengths"]["edges"], report["sources"]["books"]["lengths"]["read"]["documents"]
    # What cannot be read has no length.
    sizes = [0 if path.name == "book91.txt" else path.stat().st_size for path in paths]
    assert read == [sum(low <= size < high for size in sizes) for low, high in zip(edges[:-1], edges[1:], strict=True)]


def test_texts_are_written_as_they_were_read(tmp_path):
    text = 'Tab\t, "quotes", \\ backslash,\r\n line \u2028 separator, \x7f and 語 😀\n' * 9
    (tmp_path / "a.txt").write_bytes(text.encode())
    config = CurationConfig({"a": CuratedSource(filters=(), source=SourceConfig("text", f"{tmp_path}/a.txt"))})
    curate(config, tmp_path / "out")
    (row,) = rows(tmp_path / "out", "a")
    assert row["text"] == text
    prepare(SourceConfig("jsonl", f"{tmp_path}/out/a/*.jsonl"), "bytes", tmp_path / "ready")
    prepared = load(SourceConfig("array_record", str(tmp_path / "ready")), tokenizers.load("bytes"))
    tokens = prepared.gather(np.array([0]), np.array([0]), prepared.lengths)
    assert tokens.astype(np.uint8).tobytes() == text.encode()


def test_any_number_of_workers_writes_the_same_bytes(corpus, finished, tmp_path):
    seen = []
    curate(corpus, tmp_path / "out", workers=2, report=seen.append)
    assert contents(tmp_path / "out") == contents(finished[0])
    assert seen[-1].bytes == sum(of["read"]["bytes"] for of in finished[1]["sources"].values()) == seen[-1].fresh_bytes


def killed_and_finished(corpus, finished, tmp_path, kills, workers, seed):
    """Kill a curation after so many files, drawn at random from all that it has to write; then let it end."""
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(corpus))
    out = tmp_path / "out"
    command = [sys.executable, slow_curation.__file__, str(tmp_path / "config.pickle"), str(out), str(workers)]
    # Three files of each shard while it is judged, one when it is written; the others are few.
    shards, before = len(list(finished[0].rglob("*.jsonl"))), 0
    for moment in sorted(np.random.default_rng(seed).choice(np.arange(1, 4 * shards), kills, replace=False).tolist()):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in range(moment - before):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL and not (out / "report.json").exists()
        before = moment
    curate(corpus, out)
    assert contents(out) == contents(finished[0])


@pytest.mark.parametrize("workers", mostly_slow([1, 2], [2]))
def test_killed_at_random_it_ends_with_the_same_bytes(corpus, finished, tmp_path, workers):
    killed_and_finished(corpus, finished, tmp_path, {1: 2, 2: 1}[workers], workers, seed=workers)


@pytest.mark.slow
def test_killed_ten_times_it_ends_with_the_same_bytes(corpus, finished, tmp_path):
    killed_and_finished(corpus, finished, tmp_path, 10, 2, seed=3)


def test_a_document_that_makes_a_stage_fail_is_dropped(tmp_path, monkeypatch):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"text number {i}")

    def fails(settings, document):
        if document.name.endswith("1.txt"):
            raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(shard, "verdict", fails)
    report = curate(CurationConfig({"a": plain_source(tmp_path)}), tmp_path / "out")
    assert report["sources"]["a"]["kept"]["documents"] == 2
    assert report["sources"]["a"]["dropped"]["failed"]["reasons"] == {"ZeroDivisionError": 1}
    assert report["sources"]["a"]["dropped"]["failed"]["samples"][0]["error"] == "ZeroDivisionError: by nothing"


def plain_source(folder, pattern="*.txt", **values):
    return CuratedSource(filters=(), source=SourceConfig("text", f"{folder}/{pattern}"), **values)


def test_a_source_of_which_nothing_is_left_is_no_error(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    report = curate(CurationConfig({"a": plain_source(tmp_path)}), tmp_path / "out")
    assert report["sources"]["a"]["read"]["documents"] == 1 and report["sources"]["a"]["kept"]["documents"] == 0
    assert rows(tmp_path / "out", "a") == []


@pytest.mark.slow
def test_many_tiny_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{i} {i * 7} {i * 31} {i * 67}"}}\n' for i in range(20_000)))
    one = CuratedSource(filters=("length",), source=SourceConfig("jsonl", f"{tmp_path}/a.jsonl"))
    report = curate(CurationConfig({"a": one}, minhash=MinHashSettings(buckets=2)), tmp_path / "out")
    assert report["sources"]["a"]["kept"]["documents"] == 20_000
    assert [len(path.read_bytes().splitlines()) for path in sorted((tmp_path / "out" / "a").iterdir())] == [16384, 3616]


MEASURED = """
import resource, sys
from lcx.data.config import SourceConfig
from lcx.data.curation.config import CuratedSource, CurationConfig
from lcx.data.curation.pipeline import curate
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = CuratedSource(filters=("gopher_repetition", "fineweb"), source=SourceConfig("text", sys.argv[1]))
report = curate(CurationConfig({"a": source}), sys.argv[2])
found = report["sources"]["a"]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, found["kept"]["documents"], found["read"]["bytes"])
"""


@pytest.mark.slow
def test_a_document_of_200_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    with open(tmp_path / "a.txt", "w") as file:
        while file.tell() < 200_000_000:
            file.write(prose(rng, 100_000) + "\n")
    command = [sys.executable, "-c", MEASURED, f"{tmp_path}/a.txt", f"{tmp_path}/out"]
    mebibytes, kept, size = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert kept == 1 and size > 200_000_000
    assert mebibytes < 1024


def test_what_changed_since_the_start_is_refused(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"document number {i} " * 9)
    config, out = CurationConfig({"a": plain_source(tmp_path)}, shard_bytes=1), tmp_path / "out"

    def stop(progress):
        if progress.shards == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        curate(config, out, report=stop)
    with pytest.raises(UserError, match="holds another curation .config.shard_bytes is 1, not 2.; use a new folder or delete it"):
        curate(dataclasses.replace(config, shard_bytes=2), out)
    (tmp_path / "1.txt").write_text("another text")
    with pytest.raises(UserError, match="source 'a' has changed since .*out was started; delete the folder"):
        curate(config, out)
    (tmp_path / "1.txt").write_text("document number 1 " * 9)
    (tmp_path / "3.txt").unlink()
    (tmp_path / "2.txt").unlink()
    with pytest.raises(UserError, match="source 'a' has changed since"):
        curate(config, out)


def test_a_start_that_judged_nothing_leaves_the_folder_to_another_config(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="matches no file"):
        curate(CurationConfig({"a": plain_source(tmp_path, "*.tkt")}), tmp_path / "out")
    report = curate(CurationConfig({"a": plain_source(tmp_path)}), tmp_path / "out")
    assert report["sources"]["a"]["kept"]["documents"] == 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("empty.txt", "source text:.*empty.txt has no text; give files that are not empty"),
        ("no/*.txt", "source.path='.*no/.*' matches no file; give a path or a glob pattern"),
        ("", "source.path='.*' is a directory; add a pattern, such as"),
    ],
)
def test_a_source_without_text_is_one_sentence_of_the_command(tmp_path, capsys, pattern, message):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "config.py").write_text(CONFIG.format(path=f"{tmp_path}/{pattern}"))
    with pytest.raises(SystemExit):
        main(["data", "curate", f"--config={tmp_path}/config.py", f"--out={tmp_path}/out", "--workers=1"])
    said = capsys.readouterr().err.replace("\n", " ")
    assert re.search(message, said) and "Traceback" not in said
    assert not list((tmp_path / "out").rglob("*.jsonl"))


def test_a_worker_without_the_evaluation_files_stops_the_run(tmp_path):
    lost = shard.Shard("a", [("x", b"some text")], CuratedSource(filters=()).settings, None, f"{tmp_path}/forbidden.npz", 1, 20)
    with pytest.raises(UserError, match="finds no .*forbidden.npz; decontamination on several machines needs --out on a disk that"):
        shard.judge(lost)


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    config = CurationConfig({"a": plain_source(tmp_path)})

    def again(progress):
        with pytest.raises(UserError, match="another lcx data curate is writing"):
            curate(config, tmp_path / "out")
        seen.append(progress)

    seen = []
    curate(config, tmp_path / "out", report=again)
    assert seen


def test_a_worker_that_dies_is_said_in_a_sentence():
    with pytest.raises(UserError, match="a worker process ended with exit code 3, often for want of memory; rerun"):
        list(ordered(os._exit, [3], 2))


def test_results_come_in_the_order_of_the_tasks_and_errors_as_they_are():
    assert list(ordered(abs, iter(range(-20, 0)), 3)) == list(range(20, 0, -1))
    with pytest.raises(TypeError):
        list(ordered(abs, [1, "x"], 2))


CONFIG = """
from lcx.data.curation.config import curated, defaults

def get_config():
    return defaults(notes=curated("long", source={{"kind": "text", "path": {path!r}}}, gopher_quality={{"min_words": 2}}))
"""


def test_the_command(tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(3)
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(prose(rng, 100))
    (tmp_path / "4.txt").write_text((tmp_path / "0.txt").read_text())
    (tmp_path / "config.py").write_text(CONFIG.format(path=f"{tmp_path}/*.txt"))
    words = ["data", "curate", f"--config={tmp_path}/config.py", f"--out={tmp_path}/out", "--workers=1"]
    main(words)
    said = capsys.readouterr().out
    assert "dropped by exact" in said and re.search(r"kept\W+4\b", said)
    assert f"lcx data prepare --kind=jsonl --path='{tmp_path}/out/notes/*.jsonl'" in said.replace("\n", "")
    first = contents(tmp_path / "out")
    assert "What stays" in first["report.html"].decode() and f"page to look at: {tmp_path}/out/report.html" in said.replace(
        "\n", ""
    )
    main(words)  # finished: nothing is done again
    assert contents(tmp_path / "out") == first
    main([*words[:-2], f"--out={tmp_path}/strict", "--config.sources.notes.gopher_quality.min_words=101", "--workers=1"])
    assert re.search(r"dropped by gopher_quality\W+5\b", capsys.readouterr().out)


def test_the_config_file_can_be_read():
    config = runpy.run_path(str(Path(__file__).parents[2] / "configs/data/long_mixture.py"))["get_config"]()
    built = build(CurationConfig, config.to_dict(), "config")
    assert built.names == ("books", "code") and built.sources["code"].gopher_quality.max_words is None
    assert build(CurationConfig, defaults(a=curated("web")).to_dict()).sources["a"] == CuratedSource()
    assert built.sources["books"].length == LengthSettings(1024)
