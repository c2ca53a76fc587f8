"""Assembly: each method on cases made by hand, and the stage as a part of a curation."""

import collections
import dataclasses
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest

from lcx.cli.main import main
from lcx.core.errors import UserError
from lcx.data.config import SourceConfig
from lcx.data.curation.assemble import chunks, keywords, library, neighbours, plan, repository, settings
from lcx.data.curation.assemble.methods import METHODS, placed_in
from lcx.data.curation.assemble.settings import AssembleConfig, NearestSettings, NextLongSettings, QuestSettings, RepositorySettings
from lcx.data.curation.config import CuratedSource, CurationConfig
from lcx.data.curation.embed import EmbedConfig
from lcx.data.curation.pipeline import curate
from lcx.data.sources import sources
from lcx.data.sources.prepare import prepare
from lcx.data.tokenizers.tokenizers import Bytes
from tests.data import slow_curation


def on_a_circle(*degrees):
    """Unit vectors float32 at these angles."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_neighbours_are_the_nearest_but_for_near_duplicates():
    vectors = on_a_circle(0, 1, 20, 50, 90)
    start, end, value = neighbours.neighbours(vectors, 2, max_similarity=0.999)
    pairs = collections.defaultdict(list)
    for one, other, cosine in zip(start.tolist(), end.tolist(), value.tolist(), strict=True):
        pairs[one].append(other)
        assert cosine == pytest.approx(float(np.float64(vectors[one]) @ np.float64(vectors[other])), abs=1e-6)
    assert pairs == {0: [2, 3], 1: [2, 3], 2: [1, 0], 3: [2, 4], 4: [3, 2]}


def test_neighbours_in_blocks_are_those_of_all_pairs(monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(300, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    exact = np.float64(vectors) @ np.float64(vectors).T
    np.fill_diagonal(exact, -2)
    exact[exact > 0.9] = -2
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :5]
    monkeypatch.setattr(neighbours, "BLOCK", 300 * 7)
    start, end, _ = neighbours.neighbours(vectors, 5, 0.9)
    assert start.tolist() == np.repeat(np.arange(300), 5).tolist()
    assert end.reshape(300, 5).tolist() == expected.tolist()


def test_of_equal_similarities_the_smaller_number_is_nearer():
    assert neighbours.nearest(np.array([0.5, 0.9, 0.5, -np.inf, 0.5], np.float32), 3).tolist() == [1, 0, 2]
    assert neighbours.nearest(np.array([-np.inf, 0.1], np.float32), 2).tolist() == [1]


def test_the_path_begins_at_the_minimum_degree_and_goes_from_neighbour_to_neighbour():
    # A star: 1, 2 and 3 have 0 as their nearest, and it has 1; so 0 has three neighbours and the others one.
    star = np.array([[1, 0, 0, 0], [0.9, 0.43589, 0, 0], [0.8, 0, 0.6, 0], [0.7, 0, 0, 0.71414]], np.float32)
    assert neighbours.path(star, 1, 0.99) == ([1, 0, 2, 3], [])
    # A line, with a second one far away: where the first ends the second begins, at the one of its ends with the smaller number.
    line = on_a_circle(0, 20, 40, 180, 200, 225)
    order, left = neighbours.path(line, 1, 0.999)
    assert order == [0, 1, 2, 3, 4, 5] and left == []
    assert neighbours.path(on_a_circle(), 3, 0.9) == ([], [])


def test_near_duplicates_are_never_side_by_side():
    # 0, 1 and 2 say the same; 3 and 4 can stand between them.
    order, left = neighbours.path(on_a_circle(0, 0.1, 0.2, 60, 120), 3, 0.999)
    assert sorted(order + left) == [0, 1, 2, 3, 4] and left == []
    assert all(not {a, b} <= {0, 1, 2} for a, b in zip(order, order[1:], strict=False))
    order, left = neighbours.path(on_a_circle(0, 0.1, 0.2), 2, 0.999)
    assert len(order) == 1 and len(left) == 2


@pytest.mark.parametrize("seed", range(3))
def test_every_document_is_on_the_path_once(seed):
    vectors = np.random.default_rng(seed).normal(size=(200, 3))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    order, left = neighbours.path(vectors, 4, 0.995)
    assert sorted(order + left) == list(range(200))
    cosines = [float(vectors[a] @ vectors[b]) for a, b in zip(order, order[1:], strict=False)]
    assert max(cosines) <= 0.9951 and np.mean(cosines) > 0.7  # at random it would be 0


def test_chunks_are_whole_lines_where_lines_are_short():
    text = "".join(f"{'x' * size}\n" for size in (3, 4, 9, 1, 30)) + "end"
    found = chunks.ends(text, 10)
    pieces = [text.encode()[a:b].decode() for a, b in zip([0, *found], found, strict=False)]
    assert "".join(pieces) == text and all(0 < len(piece) <= 10 for piece in pieces)
    assert pieces == ["xxx\nxxxx\n", "x" * 9 + "\n", "x\n", "x" * 10, "x" * 10, "x" * 10, "\nend"]
    wide = "é\n" * 7
    assert chunks.ends(wide, 4) == [6, 12, 18, 21] and chunks.ends("", 5) == []


def pool_of(document, degrees, members, **options):
    length = np.full(len(document), 10)
    return chunks.Pool(
        chunks.Chunks(np.array(document), length, on_a_circle(*degrees)),
        np.array(members, bool),
        options.get("max_similarity", 0.9999),
        options.get("reuse", False),
    )


def test_each_chunk_is_followed_by_its_nearest_of_other_documents():
    #              document 0        the pool
    pool = pool_of([0, 0, 1, 1, 2], [0, 90, 10, 80, 30], [0, 0, 1, 1, 1])
    # 60 long with gaps of 2: two anchors and two negatives reach it with the last one in part, 46 with one negative each.
    assert pool.compose([0, 1], 46, 2, (1, 9)) == [0, 2, 1, 3]
    assert pool.has_free and pool.compose([0, 1], 58, 2, (2, 9)) is None
    fresh = pool_of([0, 0, 1, 1, 2], [0, 90, 10, 80, 30], [0, 0, 1, 1, 1])
    assert fresh.compose([0, 1], 58, 2, (1, 9)) == [0, 2, 4, 1, 3]
    assert not fresh.has_free


def test_negatives_are_used_once_unless_they_may_be_reused():
    for reuse, second in ((False, [1, 3]), (True, [1, 2])):
        pool = pool_of([0, 1, 2, 2], [0, 5, 10, 60], [0, 0, 1, 1], reuse=reuse)
        assert pool.compose([0], 20, 0, (1, 1)) == [0, 2]
        assert pool.compose([1], 20, 0, (1, 1)) == second


def test_a_copy_of_a_chunk_is_no_negative_of_it():
    pool = pool_of([0, 1, 2], [0, 0.01, 45], [0, 1, 1])
    assert pool.compose([0], 20, 0, (1, 1)) == [0, 2]
    empty = pool_of([0, 0], [0, 40], [0, 0])
    assert empty.compose([0, 1], 20, 0, (1, 1)) is None


def test_prominent_words_and_keywords_by_hand():
    assert keywords.prominent("The cat, the CAT; a dog-cat 42 it") == [("cat", 3), ("the", 2), ("dog", 1)]
    documents = [
        [("the", 9), ("whale", 5), ("sea", 2)],
        [("the", 8), ("sea", 4)],
        [("the", 9), ("whale", 1)],
        [("the", 3), ("fox", 9)],
    ]
    # `the` is in all of them, `fox` in one. Of the first one's words `whale` scores 1 + ln 5 times ln 2, `sea` 1 + ln 2 times that.
    options = QuestSettings(candidates=2, min_documents=2, max_share=0.5)
    assert keywords.candidates(documents, options) == [["whale", "sea"], ["sea"], ["whale"], []]
    assert keywords.candidates(documents, QuestSettings(1, 2, 0.5)) == [["whale"], ["sea"], ["whale"], []]


def test_the_word_with_most_text_comes_first_and_gives_back_what_it_does_not_use():
    words, offered = [["a", "b"], ["a"], ["b"], ["b", "a"], ["c"], ["b"]], []

    def use(documents):
        offered.append(documents)
        return documents[:2]

    # b has 41, a 40, c 9. The first two that b offers are used; then a has 20 left, and b does not come again.
    keywords.by_text(words, [10, 20, 9, 10, 9, 12], 15, use)
    assert offered == [[0, 2, 3, 5], [1, 3]]
    offered.clear()
    keywords.by_text(words, [10, 20, 9, 10, 9, 12], 31, use)
    assert offered == [[0, 2, 3, 5]]


FILES = {
    "app/main.py": "import app.util\nfrom . import models, missing\nimport os\n",
    "app/__init__.py": "",
    "app/models.py": "from .base import Base\nfrom app import util\n",
    "app/base.py": "import app.models  # a cycle of two\n",
    "app/util.py": "import numpy\n",
    "src/core/a.py": "import core.b\n",
    "src/core/b.py": "x = 1\n",
    "broken.py": "def (:\n",
    "tools/run.py": "import helper\nimport broken\n",
    "tools/helper.py": "",
    "c/main.c": '#include "lib/util.h"\n#include <stdio.h>\n#include "near.h"\n',
    "c/near.h": "",
    "include/lib/util.h": "",
    "js/index.js": "import {x} from './part';\nconst y = require('../js/deep');\nimport z from 'react';\n",
    "js/part.ts": "export const x = 1;",
    "js/deep/index.js": "",
    "src/org/x/Main.java": "import org.x.Other;\nimport java.util.List;\n",
    "src/org/x/Other.java": "",
}


def test_files_come_behind_what_they_import():
    paths = list(FILES)
    order = repository.order(paths, [repository.references(path, text) for path, text in FILES.items()])
    assert sorted(order) == list(range(len(paths)))
    place = {paths[i]: at for at, i in enumerate(order)}
    for before, behind in (
        *(("app/util.py", "app/main.py"), ("app/models.py", "app/main.py"), ("app/util.py", "app/models.py")),
        *(("src/core/b.py", "src/core/a.py"), ("tools/helper.py", "tools/run.py"), ("broken.py", "tools/run.py")),
        *(("c/near.h", "c/main.c"), ("include/lib/util.h", "c/main.c")),
        *(("js/part.ts", "js/index.js"), ("js/deep/index.js", "js/index.js")),
        ("src/org/x/Other.java", "src/org/x/Main.java"),
    ):
        assert place[before] < place[behind], (before, behind)
    # The cycle: `base` waits for `models` alone, which waits for `util` too, until that has come; then the first by path.
    assert place["app/base.py"] < place["app/models.py"]


def test_a_cycle_begins_with_the_file_that_waits_for_the_fewest():
    texts = {"a.py": "import b, c", "b.py": "import a", "c.py": "", "z.py": ""}
    order = repository.order(list(texts), [repository.references(path, text) for path, text in texts.items()])
    # c comes first; then a waits for b alone, and b for a alone.
    assert [list(texts)[i] for i in order] == ["c.py", "z.py", "a.py", "b.py"]
    texts = {"a.py": "import b, c", "b.py": "import a", "c.py": "import a, b"}
    order = repository.order(list(texts), [repository.references(path, text) for path, text in texts.items()])
    assert [list(texts)[i] for i in order] == ["b.py", "a.py", "c.py"]


def test_the_order_does_not_depend_on_the_order_of_the_files():
    rng, expected = np.random.default_rng(0), None
    for _ in range(5):
        paths = [list(FILES)[i] for i in rng.permutation(len(FILES))]
        order = repository.order(paths, [repository.references(path, FILES[path]) for path in paths])
        found = [paths[i] for i in order]
        assert expected in (None, found)
        expected = found


def test_a_repository_is_the_folder_below_the_root():
    assert placed_in("/data/repos/a/b/c.py", "/data/repos/") == ("a", "b/c.py")
    assert placed_in("/data/repos/setup.py", "/data/repos") == (".", "setup.py")
    assert placed_in("a/b.py", "") == ("a", "b.py")


def test_documents_end_with_the_part_that_reaches_the_target():
    for keep, expected in ((False, [[0, 1], [2]]), (True, [[0, 1], [2], [3]])):
        builder = plan.Builder(target=20, gap=2, keep_short=keep)
        closed = [builder.add(plan.Span(i, 0, size, size)) for i, size in enumerate((9, 9, 20, 19))]
        builder.end()
        found = builder.plan(5, {4: "no_keyword"})
        assert closed == [False, True, True, False]
        assert [[span.document for span in found.spans(i)] for i in range(len(found))] == expected
        assert found.left == ({4: "no_keyword"} if keep else {3: "too_short", 4: "no_keyword"})


def test_the_table_and_the_settings_name_the_same_methods():
    assert tuple(METHODS) == settings.METHODS == get_args(settings.Method)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AssembleConfig(method="nearst"), "method='nearst' is unknown; did you mean 'nearest'"),
        (lambda: AssembleConfig(target=0), "assemble.target=0 must be above 0"),
        (lambda: AssembleConfig(seed=-1), "assemble.seed=-1 must not be negative"),
        (lambda: AssembleConfig(sources=("a", "a")), r"assemble.sources=\('a', 'a'\) names a source twice"),
        (lambda: AssembleConfig(unit="tokens"), "unit='tokens' needs assemble.tokenizer to count with; name one"),
        (lambda: AssembleConfig(tokenizer="bytes"), "assemble.tokenizer='bytes' has no effect with unit='bytes'"),
        (
            lambda: AssembleConfig(quest=QuestSettings(3)),
            "assemble.quest has no effect with method='concatenate'; leave it out or set",
        ),
        (lambda: AssembleConfig(embedding=EmbedConfig("hashed")), "assemble.embedding has no effect with method='concatenate'"),
        (lambda: AssembleConfig("nextlong", embedding=EmbedConfig("vectors", "v.npz")), "'v.npz' has vectors of documents, but"),
        (lambda: AssembleConfig("nextlong", keep_short=True), "assemble.keep_short=True has no effect with method='nextlong'"),
        (lambda: NearestSettings(neighbours=0), "nearest.neighbours=0 must be above 0"),
        (lambda: NearestSettings(max_similarity=1.5), "nearest.max_similarity=1.5 must be a cosine above 0 and at most 1"),
        (lambda: NextLongSettings(min_negatives=3, max_negatives=2), "max_negatives=2 is below nextlong.min_negatives=3; raise it"),
        (lambda: NextLongSettings(anchor_share=1.0), "nextlong.anchor_share=1.0 must be between 0 and 1"),
        (lambda: QuestSettings(max_share=0.0), "quest.max_share=0.0 must be a share above 0"),
        (lambda: curation(a=AssembleConfig()), "config.assemble has the name 'a', which is a source already"),
        (lambda: curation(work=AssembleConfig()), "config.assemble has the name 'work', which becomes a folder"),
        (lambda: curation(long=AssembleConfig(sources=("aa",))), "config.assemble.long.sources='aa' is unknown; did you mean 'a'"),
        (lambda: curation(r=AssembleConfig("repository", ("b",))), "source 'b' is of kind 'stdlib', whose documents have no paths"),
        (lambda: curation(r=AssembleConfig("repository")), "source 'b' is of kind 'stdlib', whose documents have no paths"),
    ],
)
def test_wrong_settings_say_the_way_out(build, message):
    with pytest.raises(UserError, match=message):
        build()


def curation(**assemble):
    sources = {"a": CuratedSource(source=SourceConfig("text", "x")), "b": CuratedSource(source=SourceConfig("stdlib"))}
    return CurationConfig(sources, assemble=assemble)


WORDS = [f"{a}{b}{c}" for a in ("bra", "fle", "gri", "mo", "stu") for b in "aeiou" for c in ("nd", "rt", "sk", "mp")]
TOPICS = ("whale", "engine", "orchard", "violin")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Notes on four topics, and two repositories; the assemblies take them by every method."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for i in range(48):
        topic = TOPICS[i % 4]
        lines = [
            f"{topic} {topic} {topic} " + " ".join(rng.choice(WORDS, 7)) + (" é語" if i % 5 == 0 else "")
            for _ in range(int(rng.integers(4, 16)))
        ]
        (folder / f"note{i:02d}.txt").write_text("\n".join(lines))
    for name in ("one", "two"):
        for path, text in {
            "pkg/__init__.py": "x = 1\n",
            "pkg/a.py": "from . import b\n",
            "pkg/b.py": "y = 2\n",
            "main.py": "import pkg.a\n",
        }.items():
            place = folder / "repos" / name / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
    notes = CuratedSource(filters=(), source=SourceConfig("text", f"{folder}/*.txt"))
    code = CuratedSource(filters=(), source=SourceConfig("text", f"{folder}/repos/**/*.py"))
    return CurationConfig(
        {"notes": notes, "code": code},
        exact=False,
        minhash=None,
        shard_bytes=4_000,
        assemble={
            "joined": AssembleConfig("concatenate", ("notes",), 9000, seed=1),
            "tokens": AssembleConfig("concatenate", ("notes",), 1500, "tokens", "bytes", keep_short=True),
            "path": AssembleConfig("nearest", ("notes",), 1500, embedding=EmbedConfig("hashed")),
            "hard": AssembleConfig(
                "nextlong",
                ("notes",),
                3000,
                embedding=EmbedConfig("hashed"),
                nextlong=NextLongSettings(chunk_chars=160, max_negatives=8),
            ),
            "topics": AssembleConfig(
                "quest", ("notes",), 1200, separator="\n\f\n", quest=QuestSettings(candidates=1, max_share=0.3)
            ),
            "repos": AssembleConfig(
                "repository", ("code",), 10_000, keep_short=True, repository=RepositorySettings(f"{folder}/repos")
            ),
        },
    )


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    return folder, curate(corpus, folder)


def rows(folder, source):
    return [json.loads(line) for path in sorted((folder / source).glob("*.jsonl")) for line in path.read_bytes().splitlines()]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_parts_slice_back_to_the_texts_that_were_curated(corpus, finished):
    folder, report = finished
    originals = {(source, row["name"]): row["text"].encode() for source in ("notes", "code") for row in rows(folder, source)}
    for name, config in corpus.assemble.items():
        found = rows(folder, name)
        assert found and len(found) == report["assembled"][name]["out"]["documents"]
        for number, row in enumerate(found):
            text, separator, at = row["text"].encode(), config.separator.encode(), 0
            assert row["name"] == f"{name}:{number}" and row["source"] == name and row["bytes"] == len(text)
            for i, part in enumerate(row["parts"]):
                piece = text[part["start"] : part["end"]]
                original = originals[part["source"], part["name"]]
                assert piece and piece == original[part["from"] : part["from"] + len(piece)]
                assert config.method == "nextlong" or piece == original
                assert part["start"] == at + (len(separator) if i else 0) and text[at : part["start"]] == (separator if i else b"")
                at = part["end"]
            assert at == len(text)
            if not config.keep_short:
                assert len(text) >= config.target > len(text) - len(piece) - len(separator)


def test_nothing_is_used_twice_and_everything_is_accounted_for(corpus, finished):
    folder, report = finished
    for name in corpus.assemble:
        of, found = report["assembled"][name], rows(folder, name)
        parts = [(part["source"], part["name"], part["from"]) for row in found for part in row["parts"]]
        assert len(set(parts)) == len(parts) == of["out"]["parts"]
        used = {part[:2] for part in parts}
        left = {reason: counts["documents"] for reason, counts in of["left_over"].items() if reason != "rest"}
        assert of["in"]["documents"] == len(used) + sum(left.values())
        separators = len(corpus.assemble[name].separator.encode()) * sum(len(row["parts"]) - 1 for row in found)
        assert of["out"]["bytes"] == sum(row["bytes"] for row in found)
        assert of["in"]["bytes"] == of["out"]["bytes"] - separators + sum(counts["bytes"] for counts in of["left_over"].values())
        sizes = [row["bytes"] for row in found]
        after = of["lengths"]["after"]
        assert (after["min"], after["median"], after["max"]) == (min(sizes), np.median(sizes), max(sizes))
    assert report["assembled"]["joined"]["left_over"]["too_short"]["documents"] > 0
    assert report["assembled"]["tokens"]["left_over"] == {}


def test_hard_negatives_are_of_other_documents_than_the_one_that_is_written(finished):
    folder, _ = finished
    negatives = 0
    for row in rows(folder, "hard"):
        anchor, places = row["parts"][0]["name"], []
        for part in row["parts"]:
            if part["name"] == anchor:
                places.append(part["from"])
            else:
                negatives += 1
        assert places == sorted(places) and len(places) > 1
    assert negatives > 20


def test_documents_of_one_topic_come_together(finished):
    folder, _ = finished
    for row in rows(folder, "topics"):
        assert len({row["text"].encode()[part["start"] :].decode().split()[0] for part in row["parts"]}) == 1
    pairs = [
        row["text"].encode()[a["start"] :].split()[0] == row["text"].encode()[b["start"] :].split()[0]
        for row in rows(folder, "path")
        for a, b in zip(row["parts"], row["parts"][1:], strict=False)
    ]
    assert np.mean(pairs) > 0.6  # a quarter at random


def test_repositories_are_documents_in_dependency_order(finished):
    folder, _ = finished
    found = [[part["name"].split("repos/")[1] for part in row["parts"]] for row in rows(folder, "repos")]
    assert found == [
        [f"{name}/{path}" for path in ("pkg/__init__.py", "pkg/b.py", "pkg/a.py", "main.py")] for name in ("one", "two")
    ]


def test_any_number_of_workers_writes_the_same_bytes(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "BLOCK_BYTES", 9_000)
    config = dataclasses.replace(corpus, assemble={"hard": corpus.assemble["hard"]})
    for workers in (1, 2):
        curate(config, tmp_path / str(workers), workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(rows(tmp_path / "1", "hard")) > 2


def test_killed_while_assembling_it_ends_with_the_same_bytes(corpus, finished, tmp_path):
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(corpus))
    out = tmp_path / "out"
    command = [sys.executable, slow_curation.__file__, str(tmp_path / "config.pickle"), str(out), "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert any(line.endswith("hard/00001.jsonl\n") for line in iter(process.stdout.readline, ""))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (out / "report.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (out / "hard").glob("*.jsonl")}
    assert curate(corpus, out) == finished[1]
    assert contents(out) == contents(finished[0])
    assert len(kept) >= 2 and all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_interrupted_at_any_file_it_ends_with_the_same_bytes(corpus, finished, tmp_path, monkeypatch):
    replace, out, reached = os.replace, tmp_path / "out", []
    for wanted in ("texts/notes.json", "tokens/", "vectors/", "path/00000", "report"):

        def stop(source, target, wanted=wanted):
            if wanted in str(target):
                reached.append(wanted)
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            curate(corpus, out)
    monkeypatch.setattr(os, "replace", replace)
    assert len(reached) == 5 and curate(corpus, out) == finished[1]
    assert contents(out) == contents(finished[0])


def test_nothing_to_assemble_is_no_error(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    config = CurationConfig(
        {"a": CuratedSource(filters=(), source=SourceConfig("text", f"{tmp_path}/a.txt"))},
        assemble={method: AssembleConfig(method) for method in METHODS},
    )
    report = curate(config, tmp_path / "out")
    for of in report["assembled"].values():
        assert of["in"] == {"documents": 0, "bytes": 0} and of["out"]["documents"] == 0 and of["left_over"] == {}


CONFIG = """
from lcx.data.curation.config import curated, defaults

def get_config():
    notes = curated("long", filters=(), source={{"kind": "text", "path": {path!r}}})
    return defaults({{"assemble": {{"long": {{"method": "concatenate", "target": 100}}}}}}, notes=notes)
"""


def test_the_command(tmp_path, capsys):
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(" ".join(f"{word}{i}" for word in WORDS[:8]))
    (tmp_path / "config.py").write_text(CONFIG.format(path=f"{tmp_path}/*.txt"))
    flags = ["--config.assemble.long.target=150", "--config.assemble.long.seed=3", "--workers=1"]
    main(["data", "curate", f"--config={tmp_path}/config.py", f"--out={tmp_path}/out", *flags])
    said = capsys.readouterr().out
    assert re.search(r"concatenate of notes", said) and re.search(r"assembled\W+[34]\b", said)
    assert f"--path='{tmp_path}/out/long/*.jsonl'" in said.replace("\n", "")
    assert all(row["bytes"] >= 150 for row in rows(tmp_path / "out", "long"))


def test_end_tokens_stand_behind_each_part_in_packed_rows(finished, tmp_path):
    """With `append_eos`, packing's stream has an end token wherever a part ends, and no separator."""
    folder, _ = finished
    source, tokenizer = SourceConfig("jsonl", f"{folder}/topics/*.jsonl", append_eos=True), Bytes(eos=True)
    prepare(source, "bytes+eos", tmp_path / "ready")
    ready = SourceConfig("array_record", str(tmp_path / "ready"), append_eos=True)
    for found in (sources.load(source, tokenizer), sources.load(ready, tokenizer)):
        for i, row in enumerate(rows(folder, "topics")):
            tokens = found.gather(np.array([i]), np.array([0]), found.lengths[[i]])
            text = row["text"].encode()
            assert tokens.tolist() == [
                one for part in row["parts"] for one in (*text[part["start"] : part["end"]], tokenizer.eos_id)
            ]
    plain = sources.load(dataclasses.replace(source, append_eos=False), tokenizer)
    assert plain.lengths.tolist() == [row["bytes"] for row in rows(folder, "topics")]


@pytest.mark.parametrize("parts", [None, 5, [1], [{"start": 0}], [{"start": 0, "end": 99}], [{"start": 3, "end": 1}]])
def test_parts_of_other_programs_are_not_ours(tmp_path, parts):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "four", "parts": parts}))
    found = sources.load(SourceConfig("jsonl", f"{tmp_path}/a.jsonl", append_eos=True), Bytes(eos=True))
    assert found.lengths.tolist() == [5]


def test_what_cannot_be_had_is_said_before_anything_is_read(tmp_path):
    sources = {"a": CuratedSource(filters=(), source=SourceConfig("text", f"{tmp_path}/nothing.txt"))}
    for config, message in (
        (AssembleConfig(unit="tokens", tokenizer=f"{tmp_path}/none.json"), r"none\.json"),
        (AssembleConfig("nearest", embedding=EmbedConfig("vectors", f"{tmp_path}/none.npz")), "none.npz' cannot be read"),
        (AssembleConfig("nearest", embedding=EmbedConfig("hidden", model="runs/x")), "embedding.model='runs/x' needs a caller"),
    ):
        with pytest.raises(UserError, match=message):
            curate(CurationConfig(sources, assemble={"long": config}), tmp_path / "out")


def test_own_vectors_decide_the_path_and_a_missing_one_is_named(tmp_path):
    paths = [tmp_path / f"{i}.txt" for i in range(6)]
    for i, path in enumerate(paths):
        path.write_text(f"text {i}")
    sources = {"a": CuratedSource(filters=(), source=SourceConfig("text", f"{tmp_path}/*.txt"))}
    embedding, one = EmbedConfig("vectors", f"{tmp_path}/v.npz"), NearestSettings(neighbours=1)
    config = AssembleConfig("nearest", target=10_000, keep_short=True, embedding=embedding, nearest=one)
    # Each is nearest to the one before it; of the two ends the path begins at the one with the smaller number.
    order = [3, 0, 5, 1, 4, 2]
    vectors = on_a_circle(*((0, 20, 41, 63, 86, 110)[order.index(i)] for i in range(6)))
    np.savez(tmp_path / "v.npz", names=[str(path) for path in paths], vectors=vectors)
    curate(CurationConfig(sources, assemble={"long": config}, minhash=None), tmp_path / "out")
    (row,) = rows(tmp_path / "out", "long")
    found = [int(part["name"][-5]) for part in row["parts"]]
    assert found == order[::-1]
    np.savez(tmp_path / "v.npz", names=[str(path) for path in paths[:5]], vectors=vectors[:5])
    with pytest.raises(UserError, match=r"embedding 'vectors' has no vector for .*5\.txt; add it, or leave the document out"):
        curate(CurationConfig(sources, assemble={"long": config}, minhash=None), tmp_path / "other")
