"""The page of a curation holds the numbers of its report, escapes all text, and leaves out what there is no data for."""

import copy
import json

import numpy as np
import pytest

from lcx.data.config import SourceConfig
from lcx.data.curation.config import CuratedSource, CurationConfig, DecontaminateConfig
from lcx.data.curation.diversify import BalanceSettings, DiversityConfig
from lcx.data.curation.embed import EmbedConfig
from lcx.data.curation.pipeline import curate
from lcx.data.curation.scores import ScoreConfig
from lcx.data.curation.select import KeepRule
from lcx.data.curation.settings import LengthSettings
from lcx.report import curation_page, curation_plots
from tests.report.html_page import Page

EVIL = "<script>alert('x')</script> & <b>"


class Vowels:
    """The share of the letter e."""

    fingerprint = "vowels"

    def __call__(self, texts):
        return np.array([text.count("e") / len(text) for text in texts])


def source(folder, pattern, **values):
    filters = {"filters": ("length",), "length": LengthSettings(40)}
    return CuratedSource(source=SourceConfig("text", f"{folder}/{pattern}"), **filters, **values)


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    """A folder of two sources with everything that a page shows."""
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    secret = " ".join(f"secret{i}" for i in range(20))
    (folder / "test.jsonl").write_text(json.dumps({"question": secret}))
    for kind, words in (("a", "the sea and the ship were seen"), ("b", "it is a road on which no man but us ran")):
        for i in range(20):
            text = " ".join(rng.choice(words.split(), 20 + 15 * i)) + f" {kind}{i}"
            (folder / f"{kind}{i:02d}.txt").write_text(text)
    (folder / "a90.txt").write_text(EVIL)
    (folder / "a91.txt").write_text((folder / "a03.txt").read_text())
    (folder / "a<i>92.txt").write_text(f"{EVIL} {secret}")
    (folder / "b90.txt").write_bytes(b"\xff")
    config = CurationConfig(
        {"a": source(folder, "a*.txt", keep={"e": KeepRule(minimum=0.2)}), "b": source(folder, "b*.txt")},
        decontaminate=DecontaminateConfig(f"{folder}/test.jsonl"),
        minhash=None,
        scores={"e": ScoreConfig("vowels")},
        diversity=DiversityConfig(EmbedConfig("hashed"), clusters=3, balance=BalanceSettings(0.8)),
    )
    out = folder / "out"
    report = curate(config, out, scorers={"vowels": lambda config: Vowels()})
    path = curation_page.write(out)
    assert path == out / "report.html"
    return out, report, path.read_text()


def test_it_holds_the_numbers_of_the_report(curated):
    _, report, content = curated
    sections = Page(content).sections
    kept = sections["What stays"].tables[0]
    for row, (name, of) in zip(kept[1:], report["sources"].items(), strict=True):
        assert row[0].startswith(name) and row[1] == str(of["read"]["documents"])
        assert row[2].split()[0] == str(of["kept"]["documents"]) and row[3] == curation_plots.size(of["read"]["bytes"])
    lengths = sections["Lengths by source"].tables[0]
    for row, of in zip(lengths[1:], report["sources"].values(), strict=True):
        assert sum(int(cell.split()[0]) for cell in row[1:]) == of["kept"]["documents"]
        assert sum(int(cell.split()[-1]) for cell in row[1:]) == of["read"]["documents"]
    dropped = sections["What was dropped, to read"]
    stages = [(stage, of) for one in report["sources"].values() for stage, of in one["dropped"].items() if of["documents"]]
    assert {stage for stage, _ in stages} >= {"read", "length", "decontaminate", "exact", "select", "diversity"}
    assert [line.split(" ")[:2] for line in dropped.summaries] == [[stage, str(of["documents"])] for stage, of in stages]
    for _, of in stages:
        for sample in of["samples"]:
            assert sample["name"] in dropped.text and sample.get("text", "") in dropped.text
    assert f"stays as {report['sources']['a']['dropped']['exact']['samples'][0]['duplicate_of']}" in dropped.text


def test_it_shows_scores_and_the_map(curated):
    _, report, content = curated
    sections = Page(content).sections
    scored, of = sections["Score: e"], report["sources"]["a"]["scores"]["e"]
    assert scored.images == ["a", "b"] and scored.tables[0][1][0] == "a" and scored.tables[0][1][-1] == "at least 0.2"
    assert scored.tables[0][1][1:7] == [str(of["documents"]), "0", "0", *(f"{value:.4g}" for value in of["deciles"][::5])]
    assert scored.tables[0][2][-1] == "all"
    for decile, samples in enumerate(of["samples"]):
        assert not samples or f"Tenth {decile + 1} of 10" in scored.text
        assert all(sample["name"] in scored.text and sample["text"] in scored.text for sample in samples)
    found = report["diversity"]
    assert sections["Map"].images == ["map"] and len(sections["Map"].summaries) == len(found["clusters"]) == 3
    for i, cluster in enumerate(found["clusters"]):
        (line,) = [line for line in sections["Map"].summaries if line.startswith(f"Cluster {i + 1} ")]
        assert f"{cluster['documents']} documents, {cluster['kept']} kept" in line
        assert all(name in line for name in cluster["sources"])
        assert all(sample["text"] in sections["Map"].text for sample in cluster["samples"])


def test_pictures_are_drawn_from_the_numbers(curated):
    out, report, _ = curated
    of = report["sources"]["a"]["scores"]["e"]
    bars = curation_plots.score(of, "a", 0.2).axes[0].patches
    assert [bar.get_height() for bar in bars] == of["histogram"]
    middles = [bar.get_x() + bar.get_width() / 2 for bar in bars]
    grey = [bar.get_facecolor() != bars[-1].get_facecolor() for bar in bars]
    assert grey == [middle < 0.2 for middle in middles] and any(grey)
    for what in ("documents", "bytes"):
        axes = curation_plots.lengths(report["sources"], what).axes[0]
        assert axes.get_title(loc="left") == ("Documents by length" if what == "documents" else "KiB by length")
        heights = {group.get_label(): sum(bar.get_height() for bar in group) for group in axes.containers}
        unit = 1 if what == "documents" else 1024
        assert axes.get_xlabel() == "length of the document"
        assert all(tick % 1 == 0.5 for tick in axes.get_xticks())  # between bars
        assert axes.get_ylim()[1] > 1.05 * max(bar.get_y() + bar.get_height() for group in axes.containers for bar in group)
        assert heights["a"] * unit == pytest.approx(report["sources"]["a"]["kept"][what])
        lost = sum(one[what] for of in report["sources"].values() for one in of["dropped"].values())
        assert heights["dropped"] * unit == pytest.approx(lost)
        widths = curation_plots.shares(report["sources"], what).axes[0].containers
        assert sum(group[1].get_width() for group in widths) == pytest.approx(1)
    points = curation_page.load_points(out / "diversity.npz")
    drawn = curation_plots.corpus_map(points, curation_plots.colours(["a", "b"])).axes[0].collections
    assert sum(len(dots.get_offsets()) for dots in drawn) == report["diversity"]["documents"]


def test_text_is_escaped_and_bytes_are_the_same(curated):
    out, _, content = curated
    assert "<script" not in content and "<i>92" not in content and "&lt;script&gt;alert" in content
    assert len(content) < 3_000_000 and "http:" not in content and "https:" not in content
    before = (out / "report.html").read_bytes()
    assert curation_page.write(out).read_bytes() == before


def test_sections_without_data_are_left_out(curated):
    _, report, content = curated
    assert set(Page(content).sections) == {
        *("", "What stays", "Lengths by source", "What was dropped, to read", "Score: e", "Map", "Settings")
    }
    bare = copy.deepcopy(report)
    del bare["diversity"]
    for of in bare["sources"].values():
        del of["scores"], of["lengths"]
        of["dropped"] = {stage: {"documents": 0, "bytes": 0, "reasons": {}, "samples": []} for stage in of["dropped"]}
    assert set(Page(curation_page.render(bare)).sections) == {"", "What stays"}


def test_names_that_are_not_utf8(tmp_path):
    (tmp_path / "short\udcff.txt").write_text("few words")
    (tmp_path / "long.txt").write_text("many words " * 9)
    curate(CurationConfig({"a": source(tmp_path, "*.txt")}), tmp_path / "out")
    assert "short\\udcff.txt" in curation_page.write(tmp_path / "out").read_text()


@pytest.mark.slow
def test_a_page_of_many_sources_stays_small(curated):
    _, report, _ = curated
    many = copy.deepcopy(report)
    sample = {"name": "n" * 80, "reason": "too_short", "bytes": 9, "text": '<p class="a">text & more</p>\n' * 10}
    lost = {stage: {"documents": 20, "bytes": 180, "reasons": {"too_short": 20}, "samples": [sample] * 20} for stage in "abcdefgh"}
    one = many["sources"]["a"]
    one["dropped"], one["scores"]["e"]["samples"] = (
        lost,
        [[{"name": "n", "value": 0.5, "text": '<p class="a">text & more</p>\n' * 10}] * 3] * 10,
    )
    many["sources"] = {f"source{i}": copy.deepcopy(one) for i in range(24)}
    many["diversity"]["clusters"] = [
        dict(many["diversity"]["clusters"][0], samples=[{"name": "n", "source": "a", "text": "<" * 300}] * 3)
    ] * 999
    content = curation_page.render(many)
    assert len(content.encode()) < 3_000_000
    assert content.count("too short") >= 24 * 8


def test_a_classifier_and_assembled_documents():
    bins = [{"from": i / 10, "to": (i + 1) / 10, "documents": 0} for i in range(10)]
    bins[1] |= {"documents": 4, "predicted": 0.15, "good": 0.25}
    bins[9] |= {"documents": 12, "predicted": 0.97, "good": 0.9}
    rounds = [
        {"added_good": good, "added_not_good": 3, "auc": auc, "precision": 0.75, "recall": None, "calibration": bins}
        for good, auc in ((0, 0.91), (5, 0.985))
    ]
    counts = {"train": {"good": 30, "not_good": 20}, "held_out": {"good": 8, "not_good": 8}}
    assembled = {
        "joined": {
            "method": "concatenate", "sources": ["a", "b"], "unit": "bytes", "in": {"documents": 40, "bytes": 4000},
            "out": {"documents": 4, "bytes": 3900, "parts": 38}, "left_over": {"too_short": {"documents": 2, "bytes": 100}},
            "lengths": {"before": {"median": 100.0}, "after": {"median": 975.0}},
        }
    }  # fmt: skip
    of = {"source": "stdlib", "read": {"documents": 40, "bytes": 4000}, "kept": {"documents": 40, "bytes": 4000}, "dropped": {}}
    report = {"sources": {"a": of}, "scores": {"q": {"embedding": "hashed", **counts, "rounds": rounds}}, "assembled": assembled}
    sections = Page(curation_page.render(report)).sections
    assert sections["Classifier: q"].tables[0][1:] == [["1", "3", "0.91", "0.75", "–"], ["2", "8", "0.985", "0.75", "–"]]
    assert "30 good and 20 other" in sections["Classifier: q"].text
    line = curation_plots.calibration(bins).axes[0].lines[1].get_xydata().tolist()
    assert line == [[0.15, 0.25], [0.97, 0.9]]
    assert sections["Assembled documents"].tables[0][1] == [
        "joined concatenate of a, b", "40", "4", curation_plots.size(3900), "100 → 975 bytes", "2",
    ]  # fmt: skip


def test_sizes_are_said_with_three_digits():
    sizes = [0, 879, 1024, 1536, 10**6, 1023 * 1024, 52_747_543, 3 << 30]
    assert [curation_plots.size(size) for size in sizes] == [
        *("0 B", "879 B", "1 KiB", "1.5 KiB", "977 KiB", "1,023 KiB", "50.3 MiB", "3 GiB")
    ]


def test_synthetic_documents():
    counts = {"in": {"documents": 40, "bytes": 4000}, "out": {"documents": 9, "bytes": 900}, "sources": ["a"]}
    samples = [
        {"name": "one", "outcome": "used", "before": f"before {EVIL}", "after": f"after {EVIL}"},
        {"name": "two", "outcome": "cut_off", "before": "asked", "after": "half an ans"},
    ]
    synthesized = {
        "new": {
            **counts, "method": "rephrase", "model": "m", "left_over": {"not_drawn": {"documents": 31, "bytes": 3100}},
            "requests": 80, "answers": {"used": 60, "cut_off": 20}, "cost": None, "samples": samples,
            "tokens": {"input": 12345, "output": 6789, "estimated_requests": 3},
        },
        "rows": {**counts, "method": "task", "task": "multikey", "left_over": {}},
    }  # fmt: skip
    of = {"source": "stdlib", "read": {"documents": 40, "bytes": 4000}, "kept": {"documents": 40, "bytes": 4000}, "dropped": {}}
    content = curation_page.render({"sources": {"a": of}, "synthesized": synthesized})
    found = Page(content).sections["Synthetic documents"]
    assert found.tables[0][1:] == [
        ["new rephrase of a, by m", "40", "9", "900 B", "80", "75.0%", "about 12,345 → 6,789", "not known", "31"],
        ["rows multikey of a", "40", "9", "900 B", "–", "–", "–", "–", "0"],
    ]
    assert found.summaries == ["new answers: used 60, cut off 20; documents left over: not drawn 31"]
    assert f"before {EVIL}" in found.text and "half an ans" in found.text and "<script" not in content
