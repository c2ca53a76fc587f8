"""The page on which a stage's mixture is looked at: what is in it, how it is packed, and rows as the model sees them."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence

import numpy as np

from lcx.data.config import SourceConfig
from lcx.data.loader import Loader, TextPart, unmapped
from lcx.data.report import COLUMNS, UPSAMPLING_COLUMNS, PartReport, Report, UpsamplingShare, compare_upsampling, shares_over_stage
from lcx.data.row_text import RowText, row_texts
from lcx.data.sources.documents import describe
from lcx.report import mixture_plot, row_page, style
from lcx.report.page import Cell, document, folded, page, panels, sections, table

_FOOTER = "Written by lcx data inspect; every number is counted from rows that the stage trains on."


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What the page shows of a stage: counts over its rows, the rows, and what may be missing of the rest.

    `packing`: how each part's text is packed. `upsampling`: what each way of length upsampling would do, empty where nothing is
    thinned. `over_stage`: first and last step of each tenth of the stage with the shares of rows by part, empty where weights do
    not change. `repeats`: how often each source of text is read, and the parts that read it.
    """

    stage: str
    steps: int
    report: Report
    rows: Sequence[RowText]
    packing: Mapping[str, str]
    upsampling: Sequence[UpsamplingShare]
    over_stage: Sequence[tuple[int, int, np.ndarray]]
    repeats: Mapping[SourceConfig, tuple[float, list[str]]]


def collect(stage: str, steps: int, loader: Loader, report: Report, rows: int = 20) -> Mixture:
    """Everything of a stage's loader that the page shows, with about `rows` rows to read."""
    texts = {name: unmapped(part) for name, part in zip(loader.names, loader.parts, strict=True)}
    packed = {name: part.config.packing for name, part in texts.items() if isinstance(part, TextPart)}
    thinned = any(loader.config.parts[name].short_keep < 1 for name in loader.names)
    return Mixture(
        stage=stage,
        steps=steps,
        report=report,
        rows=row_texts(loader, rows),
        packing={
            name: ", ".join([of.method, *(key for key in ("mask_documents", "reset_positions", "shared_bos") if getattr(of, key))])
            for name, of in packed.items()
        },
        upsampling=compare_upsampling(loader) if thinned else [],
        over_stage=shares_over_stage(loader),
        repeats=loader.repeats(steps),
    )


def render(mixture: Mixture) -> str:
    """The HTML of a stage's mixture; sections without data are left out."""
    report, names = mixture.report, [part.name for part in mixture.report.parts]
    total = f"{sum(part.rows for part in report.parts):,} rows"
    drawn = {
        "documents by length": mixture_plot.by_length(report, "documents"),
        "tokens by length": mixture_plot.by_length(report, "tokens"),
        "shares": mixture_plot.shares(report),
    }
    if mixture.over_stage:
        drawn["shares over the stage"] = mixture_plot.over_stage(names, mixture.over_stage)
    pictures = panels((name, style.png(figure)) for name, figure in drawn.items())
    body = sections(
        [
            ("Mixture", pictures + table(COLUMNS, [(row, "") for row in report.rows()]), ""),
            ("Part by length of the document", _part_by_length(report), _LENGTH_NOTE),
            ("Packing and fill", _packing(mixture), _PACKING_NOTE),
            ("Share of rows over the stage", _over_stage(names, mixture.over_stage), ""),
            ("Length upsampling", _upsampling(mixture.upsampling), ""),
            ("Repeats", _repeats(mixture), _REPEAT_NOTE),
            ("Samples", _samples(report.parts), ""),
            ("Rows as the model sees them", row_page.rows_html(mixture.rows) if mixture.rows else "", _ROW_NOTE),
        ]
    )
    lead = f"{mixture.steps:,} steps on rows of {report.seq_len:,} tokens. Counts are over {total}."
    css = row_page.style_of(row_page.shades(mixture.rows)) + "th { white-space: nowrap; }"
    return page(
        f"Mixture of {mixture.stage}", f"Mixture of {mixture.stage}", lead, _tiles(report), body, footer=_FOOTER, extra_style=css
    )


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """(caption, value, small print) of the key figures."""
    places, tokens, trained = (sum(getattr(part, key) for part in report.parts) for key in ("places", "tokens", "trained"))
    weight = sum(part.loss_weight for part in report.parts)
    texts = [part for part in report.parts if part.kind == "text"]
    tiles = [
        ("filled", f"{report.fill_ratio:.2%}", f"{tokens:,} tokens in {places:,} places"),
        ("tokens with loss", f"{trained / max(tokens, 1):.1%}", f"sum of loss weights {row_page.weight_sum(weight)}"),
    ]
    if texts:
        long = sum(count for part in texts for count, low in zip(part.tokens_by_length, report.edges, strict=False) if low >= 4096)
        share = long / max(sum(part.tokens for part in texts), 1)
        documents = sum(part.documents for part in texts)
        tiles.append(
            ("long text", f"{share:.1%}", f"of it is in documents of 4,096 tokens or more; {documents:,} documents in all")
        )
    return tiles


_LENGTH_NOTE = (
    "Share of all tokens that comes from documents of so many tokens, the higher number excluded; in grey the number of documents."
)


def _part_by_length(report: Report) -> str:
    used = [i for i in range(len(report.edges) - 1) if any(part.documents_by_length[i] for part in report.parts)]
    total = max(sum(sum(part.tokens_by_length) for part in report.parts), 1)
    rows: list[tuple[Sequence[Cell], str]] = []
    for part in report.parts:
        cells: list[Cell] = [part.name]
        for i in used:
            tokens, documents = part.tokens_by_length[i], part.documents_by_length[i]
            cells.append((f"{tokens / total:.1%}", f"{documents:,}") if documents else "–")
        rows.append(([*cells, f"{sum(part.tokens_by_length) / total:.1%}"], ""))
    if len(report.parts) > 1:
        sums = (f"{sum(part.tokens_by_length[i] for part in report.parts) / total:.1%}" for i in used)
        rows.append((("all", *sums, "100.0%"), "strong"))
    names = [f"{style.tokens(low)}–{style.tokens(high)}" for low, high in zip(report.edges[:-1], report.edges[1:], strict=True)]
    names[-1] = f"{style.tokens(report.edges[-2])} and more"
    return table(("part", *(names[i] for i in used), "all"), rows)


_PACKING_NOTE = (
    "A piece is what a row holds of one document, or a task's whole row; it is cut if that is not the whole document. "
    "A row is full if it has no padding."
)


def _packing(mixture: Mixture) -> str:
    rows = []
    for part in mixture.report.parts:
        count, packed = max(part.rows, 1), mixture.packing.get(part.name, "–")
        counts = (f"{part.rows:,}", f"{part.fill_ratio:.2%}", f"{part.full_rows / count:.1%}")
        pieces = (f"{part.pieces / count:.2f}", f"{part.cut / max(part.pieces, 1):.1%}")
        cells = (part.name, packed, *counts, f"{part.least_tokens:,}" if part.rows else "–", *pieces)
        rows.append((cells, ""))
    heads = ("part", "packing", "rows", "filled", "full rows", "tokens in the emptiest", "pieces a row", "cut")
    return table(heads, rows)


def _over_stage(names: Sequence[str], tenths: Sequence[tuple[int, int, np.ndarray]]) -> str:
    rows = [((f"{first:,}–{last:,}", *(f"{share:.1%}" for share in shares)), "") for first, last, shares in tenths]
    return table(("steps", *names), rows) if rows else ""


def _upsampling(found: Sequence[UpsamplingShare]) -> str:
    rows = [
        ((one.how.replace("_", " "), one.part, f"{one.tokens:.1%}", f"{one.long_documents:.2%}", f"{one.long_tokens:.1%}"), "")
        for one in found
    ]
    return table(UPSAMPLING_COLUMNS, rows) if rows else ""


_REPEAT_NOTE = (
    "Times that the stage reads a source's training text; beyond four, repeated text teaches ever less (arXiv:2305.16264)."
)


def _repeats(mixture: Mixture) -> str:
    rows = [
        ((describe(source), ", ".join(parts), f"{times:.2f}"), "strong" if times > 4 else "")
        for source, (times, parts) in mixture.repeats.items()
    ]
    return table(("source", "parts", "times read"), rows) if rows else ""


def _samples(parts: Sequence[PartReport]) -> str:
    shown = []
    for part in parts:
        found = []
        for sample in part.samples:
            # A sample of text or of a skill has its name in front.
            name, mark, text = sample.partition(": ") if part.kind in ("text", "questions") else ("", ":", sample)
            found.append(document(name, "", text) if mark else document("", "", sample))
        if found:
            shown.append(folded(part.name, "".join(found), f"{part.kind}, {len(found)} to read"))
    return "".join(shown)


_ROW_NOTE = html.escape(
    "Each token is shaded by the weight of the loss on predicting it; point at it for the number. Dashed lines are where documents "
    "begin. Of rows of more than 4,096 tokens the ends are shown, and what is around beginnings of documents and changes of weight."
)
