"""The page of a mixture holds the numbers of its report, and rows with the loss weights of the loader's batches."""

import re
from pathlib import Path

import numpy as np
import pytest

from lcx.cli.main import main
from lcx.core.configs import build
from lcx.data.config import DataConfig
from lcx.data.loader import Loader
from lcx.data.report import inspect
from lcx.data.row_text import WHOLE, row_texts, windows
from lcx.data.schedule import Schedule
from lcx.data.tokenizers import tokenizers
from lcx.report import mixture_page, row_page
from tests.report.html_page import Page

RUN = re.compile(r"tokens? (\d+)(?:–(\d+))?, loss weight (\S+)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Short and long documents, one with a name and a text that are HTML."""
    path, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for i in range(30):
        (path / f"d{i:02d}.txt").write_text("".join(rng.choice(list("abc de\n"), int(rng.lognormal(4, 1)) + 9)))
    for i in range(6):
        (path / f"<i>{i}.txt").write_text("<script>alert('x')</script> & \x07 naïve → 東京\n" * 3)
    return path


@pytest.fixture(scope="module")
def loader(folder):
    """Text under a mask with anchors and end tokens, text whose positions are skipped, needles, and questions."""
    source = {"kind": "text", "path": f"{folder}/*.txt"}
    packing = {"method": "best_fit", "mask_documents": True, "reset_positions": True, "shared_bos": True}
    parts = {
        "packed": {"weight": 0.4, "loss_weight": 0.5, "source": {**source, "append_eos": True}, "packing": packing},
        "skipped": {"weight": 0.2, "source": source, "remap": "pose", "short_keep": 0.5, "short_tokens": 100},
        "needles": {"kind": "multikey", "weight": 0.2, "task": {"needles": 2, "queries": 2, "answer_weight": 10.0}},
        "asked": {"kind": "questions", "weight": 0.2},
    }
    config = build(DataConfig, {"parts": parts, "tokenizer": "bytes+bos+eos", "heldout_fraction": 0.0})
    return Loader(config, 384, 4, seed=0, max_position=1000)


@pytest.fixture(scope="module")
def mixture(loader):
    return mixture_page.collect("base", 8, loader, inspect(loader, 32))


@pytest.fixture(scope="module")
def content(mixture):
    return mixture_page.render(mixture)


def test_rows_have_the_weights_of_the_batches(loader, mixture, content):
    rows = mixture.rows
    assert {row.part for row in rows} == set(loader.names) and 18 <= len(rows) <= 22
    spans = iter(Page(content).sections["Rows as the model sees them"].spans)
    for row in rows:
        batch = loader.batch(row.step)
        parts, _ = loader.addresses(row.step)
        assert loader.names[parts[row.row]] == row.part
        shown, found = np.full(loader.seq_len + 1, np.nan), ""
        while np.isnan(shown[: row.filled]).any():
            kind, title, text = next(spans)
            if kind.startswith("w") and title:
                first, last, weight = RUN.match(title).groups()
                shown[int(first) : int(last or first) + 1] = float(weight)
                found += text
        weights = batch.loss_weights[row.row]
        np.testing.assert_array_equal(row.weights, weights)
        # What a place predicts is the token behind it; nothing predicts the first one.
        assert shown[0] == 0
        np.testing.assert_array_equal(shown[1 : row.filled], weights[: row.filled - 1])
        assert np.all((batch.targets[row.row, :-1] == batch.tokens[row.row, 1:]) | (weights[:-1] == 0))
        tokens = batch.tokens[row.row, : row.filled]
        expected = "".join(
            "<s>" if t == 256 else "</s>" if t == 257 else chr(0x2407) if t == 7 else chr(t) for t in tokens if t < 128 or t > 255
        )
        assert "".join(c for c in found if ord(c) < 128 or c == "\u2407") == expected
        if weights[-1] > 0:
            kind, title, text = next(span for span in spans if span[0].startswith("w"))
            target = int(batch.targets[row.row, -1])
            assert title == f"predicted by the last token, loss weight {weights[-1]:g}"
            assert text == ("</s>" if target == 257 else bytes([target]).decode("utf-8", "replace"))
    assert any(row.weights[-1] > 0 for row in rows)


def test_shades_and_their_legend(mixture, content):
    weights = np.unique(np.concatenate([row.weights for row in mixture.rows]))
    assert weights.tolist() == [0, 0.5, 1, 6, 10]
    legend = Page(content).sections["Rows as the model sees them"].text
    assert all(f"loss weight {weight:g}" in legend for weight in weights[1:]) and "no loss" in legend
    for kind, title, _ in Page(content).sections["Rows as the model sees them"].spans:
        if title:
            assert kind == f"w{weights.tolist().index(float(title.rsplit(' ', 1)[1]))}"
    many = [mixture.rows[0].__class__(**{**vars(mixture.rows[0]), "weights": np.arange(40, dtype=np.float32)})]
    steps = row_page.shades(many)
    assert len(steps) == 8 and steps[0][0] == 1 and steps[-1][1] == 39
    assert all(before[1] < after[0] for before, after in zip(steps, steps[1:], strict=False))


def test_bounds_of_documents_and_padding(loader, mixture, content):
    bounds = [text for kind, _, text in Page(content).sections["Rows as the model sees them"].spans if kind == "bound"]
    expected = []
    for row in mixture.rows:
        batch, at = loader.batch(row.step), 0
        segments, positions = batch.segments[row.row], batch.positions[row.row]
        _, numbers = loader.addresses(row.step)
        for place in loader.provenance(row.step)[row.row].split(": ", 1)[1].split("; ")[0].split(", ") if row.spans else ():
            name, first, last = re.fullmatch(r"(.*)\[(\d+):(\d+)\]", place).groups()
            start, at = (1, 1) if row.part == "packed" and at == 0 else (at, at)
            size = int(last) - int(first)
            line = next(
                one for one in bounds if one.startswith(f"{name}: ") and (first == "0" or f"tokens {int(first):,} to" in one)
            )
            shown = positions[start], positions[start + size - 1]
            if shown != (start, start + size - 1):
                expected.append((name, f", positions {shown[0]:,} to {shown[1]:,}"))
            else:
                expected.append((name, ""))
            assert line and len(set(segments[start : start + size].tolist())) == 1
            at += size
        if row.filled < loader.seq_len:
            expected.append((f"{loader.seq_len - row.filled:,} places of padding", ""))
    assert len(bounds) == len(expected)
    for text, (name, end) in zip(bounds, expected, strict=True):
        assert text.startswith(name) and text.endswith(end)
    assert any("padding" in text for text in bounds) and any("all of its" in text for text in bounds)
    assert any(", positions 1 to" in text for text in bounds)


def test_it_holds_the_numbers_of_the_report(loader, mixture, content):
    sections, report = Page(content).sections, mixture.report
    assert [tuple(row) for row in sections["Mixture"].tables[0][1:]] == report.rows()
    lengths = sections["Part by length of the document"].tables[0]
    for row, part in zip(lengths[1:], report.parts, strict=False):
        shown = [int(cell.split()[1]) for cell in row[1:-1] if cell != "–"]
        assert row[0] == part.name and shown == [count for count in part.documents_by_length if count]
        assert float(row[-1][:-1]) == pytest.approx(100 * report.token_shares()[part.name], abs=0.5)
    packing = {row[0]: row[1:] for row in sections["Packing and fill"].tables[0][1:]}
    assert packing["packed"][0] == "best_fit, mask_documents, reset_positions, shared_bos" and packing["asked"][0] == "–"
    for part in report.parts:
        filled, pieces, cut = [], 0, 0
        for step in range(8):
            own = loader.addresses(step)[0] == loader.names.index(part.name)
            filled += (loader.batch(step).segments[own] != 0).sum(axis=1).tolist()
            for line, mine in zip(loader.provenance(step), own, strict=True):
                if mine and part.kind == "text":
                    found = re.findall(r"/([^/]*)\[(\d+):(\d+)\]", line)
                    pieces += len(found)
                    source = loader.parts[loader.names.index(part.name)]
                    source = getattr(source, "part", source).source
                    sizes = {name.rsplit("/", 1)[1]: length for name, length in zip(source.names, source.lengths, strict=True)}
                    cut += sum(int(last) - int(first) < sizes[name] for name, first, last in found)
        assert (part.rows, part.least_tokens, part.full_rows) == (len(filled), min(filled), filled.count(384))
        assert part.kind != "text" or (part.pieces, part.cut) == (pieces, cut)
        assert packing[part.name][1:5] == [
            str(part.rows), f"{sum(filled) / 384 / len(filled):.2%}", f"{filled.count(384) / len(filled):.1%}", str(min(filled)),
        ]  # fmt: skip
    repeats = {row[1]: float(row[2]) for row in sections["Repeats"].tables[0][1:]}
    for times, parts in loader.repeats(8).values():
        assert repeats[", ".join(parts)] == pytest.approx(times, abs=0.005)
    assert len(sections["Length upsampling"].tables[0]) == 1 + 3 * 3
    samples = sections["Samples"]
    assert all(
        sample.partition(": ")[2] in samples.text for part in report.parts if part.kind != "multikey" for sample in part.samples
    )


def test_text_is_escaped_and_bytes_are_the_same(loader, mixture, content):
    assert "<script" not in content and "<i>0" not in content and "&lt;script&gt;" in content and "&lt;i&gt;0.txt" in content
    assert "http:" not in content and "https:" not in content and len(content.encode()) < 3_000_000
    assert mixture_page.render(mixture_page.collect("base", 8, loader, inspect(loader, 32))) == content


def test_sections_without_data_are_left_out(loader, folder, content):
    assert "Share of rows over the stage" not in Page(content).sections
    parts = {"needles": {"kind": "key_value", "task": {"queries": 1}}}
    needles = Loader(build(DataConfig, {"parts": parts}), 64, 2, seed=0)
    sections = Page(mixture_page.render(mixture_page.collect("x", 3, needles, inspect(needles, 4, samples=0)))).sections
    assert set(sections) == {"", "Mixture", "Part by length of the document", "Packing and fill", "Rows as the model sees them"}


def test_weights_that_change(folder):
    parts = {
        "a": {"weight": 1.0, "source": {"kind": "text", "path": f"{folder}/d*.txt"}},
        "n": {"kind": "key_value", "weight": 1.0, "task": {"queries": 1}},
    }
    config = build(DataConfig, {"parts": parts, "heldout_fraction": 0.0})
    loader = Loader(config, 64, 4, seed=0, schedule=Schedule(steps=20, knots={"a": ((0.0, 1.0), (1.0, 0.0))}))
    mixture = mixture_page.collect("x", 20, loader, inspect(loader, 40))
    table = Page(mixture_page.render(mixture)).sections["Share of rows over the stage"].tables[0]
    counts = np.stack([np.bincount(loader.addresses(step)[0], minlength=2) for step in range(20)]).reshape(10, 2, 2).sum(1) / 8
    assert [row[1:] for row in table[1:]] == [[f"{share:.1%}" for share in row] for row in counts]


def test_long_rows_show_their_ends_and_what_changes():
    assert windows(np.ones(WHOLE), []) == [(0, WHOLE)] and windows(np.ones(0), []) == []
    weights = np.ones(100_000)
    weights[50_000:50_010] = 6
    found = windows(weights, [0, 70_000])
    assert found[0][0] == 0 and found[-1][1] == 100_000
    inside = [
        any(start <= place < end for start, end in found) for place in (49_950, 50_009, 50_050, 69_950, 70_050, 60_000, 90_000)
    ]
    assert inside == [True, True, True, True, True, False, False]
    weights[::2] = 2
    assert sum(end - start for start, end in windows(weights, [])) <= WHOLE


def test_a_long_row_says_what_is_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 4000)
    part = {"source": {"kind": "text", "path": f"{tmp_path}/a.txt"}}
    loader = Loader(build(DataConfig, {"parts": {"a": part}, "heldout_fraction": 0.0}), 10_000, 1, seed=0)
    (row, *_) = row_texts(loader, 1)
    content = row_page.rows_html([row])
    (gap,) = re.findall(r"… ([\d,]+) tokens …", content)
    assert int(gap.replace(",", "")) + sum(not token.is_target for token in row.tokens) == 10_000


def test_special_tokens_are_those_of_the_tokenizer(loader, mixture):
    tokenizer = tokenizers.load("bytes+bos+eos")
    packed = [row for row in mixture.rows if row.part == "packed"]
    assert {token.text for row in packed for token in row.tokens if token.special} == {"<s>", "</s>"}
    for row in packed:
        tokens = loader.batch(row.step).tokens[row.row]
        marked = [token.place for token in row.tokens if token.special and not token.is_target]
        assert marked == [i for i in range(row.filled) if tokenizer.special(int(tokens[i]))]


def test_the_command(tmp_path, capsys):
    config = f"{Path(__file__).parents[2]}/configs/quickstart.py:smoke"
    words = ["data", "inspect", f"--config={config}", "--stage=base_64", "--rows=64", f"--html={tmp_path}/mixture.html"]
    main(words)
    assert "page to look at" in capsys.readouterr().out
    sections = Page((tmp_path / "mixture.html").read_text()).sections
    assert "3 steps on rows of 64 tokens" in sections[""].text
    before = (tmp_path / "mixture.html").read_bytes()
    main(words)
    assert (tmp_path / "mixture.html").read_bytes() == before
