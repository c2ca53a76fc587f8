"""The page on which a curation is looked at: `report.html`, made of the files in its folder and nothing else."""

from __future__ import annotations

import html
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lcx.core.files import write_atomically
from lcx.report import curation_plots, style
from lcx.report.curation_plots import Points, size
from lcx.report.page import Cell, document, folded, page, panels, picture, sections, table

PAGE = "report.html"
DOCUMENTS, CLUSTERS, HISTOGRAMS = 800, 80, 16
"""Of dropped and of scored documents to read, of clusters and of pictures of scores a page has about so many at most, so that it
stays small however many sources there are."""
_LENGTHS = (0, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
_STYLE = """
td span { margin-left: 7px; min-width: 0; }
td:first-child span { white-space: normal; overflow-wrap: anywhere; max-width: 40ch; }
@media (max-width: 560px) { td:first-child span { display: block; max-width: 16ch; margin-left: 0; } }
"""
_FOOTER = "Written by lcx from report.json; every number comes from it."


def write(folder: str | os.PathLike[str]) -> pathlib.Path:
    """Write `report.html` next to a curation's `report.json`; the same files give the same bytes."""
    folder = pathlib.Path(folder)
    report, config = (json.loads((folder / name).read_bytes()) for name in ("report.json", "curation.json"))
    points = load_points(folder / "diversity.npz") if "diversity" in report else None
    # Names of files may hold bytes that are not UTF-8.
    return write_atomically(folder / PAGE, render(report, config, points).encode("utf-8", "backslashreplace"))


def load_points(path: pathlib.Path) -> Points | None:
    """The map that a curation wrote, None where it wrote none."""
    if not path.exists():
        return None
    with np.load(path) as stored:
        names = tuple(json.loads(stored["names"].tobytes()))
        return Points(stored["xy"], stored["cluster"], stored["source"], stored["kept"], names)


def render(report: Mapping[str, Any], config: Mapping[str, Any] | None = None, points: Points | None = None) -> str:
    """The HTML of a curation's report; `config` is the content of its curation.json, `points` its map.

    Sections without data are left out.
    """
    sources = report["sources"]
    read, kept = (
        {what: sum(of[key][what] for of in sources.values()) for what in ("documents", "bytes")} for key in ("read", "kept")
    )
    body = sections(
        [
            ("What stays", _drawn(curation_plots.shares, sources) + _kept_table(sources), ""),
            ("Lengths by source", _drawn(curation_plots.lengths, sources) + _length_table(sources), _LENGTH_NOTE),
            ("What was dropped, to read", _dropped(sources), ""),
            *((f"Score: {name}", _score(name, sources, config or {}), "") for name in _score_names(sources)),
            *((f"Classifier: {name}", _classifier(of), "") for name, of in report.get("scores", {}).items() if "rounds" in of),
            ("Map", _map(report.get("diversity"), points, list(sources)), _map_note(report.get("diversity"))),
            ("Assembled documents", _assembled(report.get("assembled", {})), ""),
            ("Synthetic documents", _synthesized(report.get("synthesized", {})), ""),
            ("Settings", _settings(config), ""),
        ]
    )
    several = f"{len(sources):,} sources" if len(sources) > 1 else f"the source {next(iter(sources), '')}"
    lead = f"{read['documents']:,} documents of {several}, {size(read['bytes'])} of text; {kept['documents']:,} stay."
    return page("Curation", "Curation", lead, _tiles(report, read, kept), body, footer=_FOOTER, extra_style=_STYLE)


def _tiles(report: Mapping[str, Any], read: Mapping[str, int], kept: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """(caption, value, small print) of the key figures."""
    lost: dict[str, int] = {}
    for of in report["sources"].values():
        for stage, dropped in of["dropped"].items():
            lost[stage] = lost.get(stage, 0) + dropped["documents"]
    counts = {what: f"{kept[what] / max(read[what], 1):.1%}" for what in read}
    tiles = [
        ("documents kept", counts["documents"], f"{kept['documents']:,} of {read['documents']:,}"),
        ("text kept", counts["bytes"], f"{size(kept['bytes'])} of {size(read['bytes'])}"),
    ]
    if any(lost.values()):
        most = max(lost, key=lambda stage: lost[stage])
        tiles.append(("drops most", most.replace("_", " "), f"{lost[most]:,} documents"))
    if found := report.get("evaluation"):
        hits = lost.get("decontaminate", 0)
        tiles.append(("share text with evaluations", f"{hits:,}", f"{found['texts']:,} texts, {found['ngrams']:,} n-grams"))
    if found := report.get("diversity"):
        before, after, random = (style.number(found[f"vendi_{when}"]) for when in ("before", "after", "random"))
        tiles.append(("Vendi score", f"{before} → {after}", f"{random} for as many at random"))
    return tiles


def _drawn(draw: Callable[[Mapping[str, Any], str], Figure | None], sources: Mapping[str, Any]) -> str:
    """A picture of documents beside one of bytes."""
    figures = {what: draw(sources, what) for what in ("documents", "bytes")}
    return panels([(what, style.png(figure)) for what, figure in figures.items() if figure is not None])


def _kept_table(sources: Mapping[str, Any]) -> str:
    rows = []
    for name, of in sources.items():
        read, kept = of["read"], of["kept"]
        cells = (
            (name, of["source"]), f"{read['documents']:,}", (f"{kept['documents']:,}", _fraction(kept, read, "documents")),
            size(read["bytes"]), (size(kept["bytes"]), _fraction(kept, read, "bytes")),
        )  # fmt: skip
        rows.append((cells, ""))
    return table(("source", "documents read", "kept", "text read", "kept"), rows)


def _fraction(part: Mapping[str, int], whole: Mapping[str, int], what: str) -> str:
    return f"{part[what] / max(whole[what], 1):.1%}"


_LENGTH_NOTE = "Documents kept, with the number read in grey where it differs. Lengths are bytes of UTF-8."


def _length_table(sources: Mapping[str, Any]) -> str:
    rows = []
    for name, of in sources.items():
        if not (found := of.get("lengths", {})).get("edges"):
            continue
        counts = np.zeros((2, len(_LENGTHS)), int)
        bins = np.searchsorted(_LENGTHS, found["edges"][:-1], "right") - 1
        for row, key in enumerate(("kept", "read")):
            np.add.at(counts[row], bins, found[key]["documents"])
        cells: list[Cell] = [name]
        cells += [f"{kept:,}" if kept == read else (f"{kept:,}", f"of {read:,}") for kept, read in counts.T.tolist()]
        rows.append((cells, ""))
    if not rows:
        return ""
    heads = [f"{size(low)}–{size(high)}" for low, high in zip(_LENGTHS[1:-1], _LENGTHS[2:], strict=True)]
    return table(("source", f"below {size(_LENGTHS[1])}", *heads, f"{size(_LENGTHS[-1])} and more"), rows)


def _dropped(sources: Mapping[str, Any]) -> str:
    """Every stage of every source that dropped something, with documents to read."""
    lost = [(name, stage, of) for name, one in sources.items() for stage, of in one["dropped"].items() if of["documents"]]
    most = max(1, DOCUMENTS // max(len(lost), 1))
    parts, last = [], None
    for name, stage, of in lost:
        if name != last:
            parts.append(f"<h3>{html.escape(name)}</h3>")
            last = name
        reasons = ", ".join(f"{reason.replace('_', ' ')} {count:,}" for reason, count in of["reasons"].items())
        shown = of["samples"][:most]
        count = f"{of['documents']:,} document{'' if of['documents'] == 1 else 's'}, {size(of['bytes'])}: {reasons}"
        if shown and len(shown) < of["documents"]:
            count += f"; {len(shown)} to read"
        parts.append(folded(stage, "".join(map(_sample, shown)), count))
    return "".join(parts)


def _sample(sample: Mapping[str, Any]) -> str:
    facts = [str(sample["reason"]).replace("_", " ")]
    if sample["bytes"]:
        facts.append(size(sample["bytes"]))
    if other := sample.get("duplicate_of"):
        facts.append(f"stays as {other}")
    if values := sample.get("scores"):
        facts += [f"{name} {_number(value)}" for name, value in values.items()]
    facts += [f"{key} {value}" for key in ("error", "cluster", "distance") if (value := sample.get(key)) is not None]
    return document(sample["name"], " · ".join(facts), sample.get("text", ""))


def _score_names(sources: Mapping[str, Any]) -> list[str]:
    return sorted({name for of in sources.values() for name in of.get("scores", {})})


def _score(name: str, sources: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Histograms, a table of quantiles and documents of each decile of a score."""
    found = {source: of["scores"][name] for source, of in sources.items() if name in of.get("scores", {})}
    rules = {source: config.get("sources", {}).get(source, {}).get("keep", {}).get(name) for source in found}
    minimum = {source: rule["minimum"] for source, rule in rules.items() if rule and rule.get("minimum") is not None}
    largest = sorted(
        (source for source, of in found.items() if of.get("histogram")), key=lambda source: -found[source]["documents"]
    )
    drawn = largest[: max(2, HISTOGRAMS // len(_score_names(sources)))]
    figures = {source: curation_plots.score(found[source], source, minimum.get(source)) for source in found if source in drawn}
    parts = [panels((source, style.png(figure)) for source, figure in figures.items())]
    rows = []
    for source, of in found.items():
        counts = (f"{of[key]:,}" for key in ("documents", "missing", "failed"))
        rows.append(((source, *counts, *_quantiles(of["deciles"]), _rule(rules[source])), ""))
    parts.append(table(("source", "documents", "without", "failed", "lowest", "median", "highest", "stays"), rows))
    most = max(1, DOCUMENTS // (10 * len(found) * len(_score_names(sources))))
    for source, of in found.items():
        shown = []
        for decile, samples in enumerate(of["samples"]):
            if samples:
                low, high = (_number(of["deciles"][decile + i]) for i in range(2))
                shown.append(f"<h3>Tenth {decile + 1} of 10, from {low} to {high}</h3>")
                shown += [document(one["name"], f"{name} {_number(one['value'])}", one["text"]) for one in samples[:most]]
        if shown:
            parts.append(
                folded(source, "".join(shown), "documents from each tenth, the lowest first, drawn by a hash of their names")
            )
    if minimum:
        parts.append("<p class=note>Grey: below the minimum.</p>")
    return "".join(parts)


def _quantiles(deciles: Sequence[float]) -> list[str]:
    return [_number(value) for value in deciles[::5]] or ["–"] * 3


def _rule(rule: Mapping[str, Any] | None) -> str:
    if not rule:
        return "all"
    if rule.get("minimum") is not None:
        return f"at least {_number(rule['minimum'])}"
    return f"top {rule['top_share']:.4g} of {rule['by']}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _classifier(of: Mapping[str, Any]) -> str:
    """How well a quality classifier does on labels that it has not seen."""
    rows = [
        (
            (
                f"{i + 1}",
                f"{one['added_good'] + one['added_not_good']:,}",
                *(_number(one[key]) for key in ("auc", "precision", "recall")),
            ),
            "",
        )
        for i, one in enumerate(of["rounds"])
    ]
    labels = f"{of['train']['good']:,} good and {of['train']['not_good']:,} other documents"
    held = f"{of['held_out']['good']:,} and {of['held_out']['not_good']:,} held out"
    note = html.escape(f"Learned from {labels}, {held}; vectors: {of['embedding']}.")
    drawn = panels([("calibration", style.png(curation_plots.calibration(of["rounds"][-1]["calibration"])))])
    heads = ("round", "labels added", "AUC", "precision", "recall")
    return f"{drawn}{table(heads, rows)}<p class=note>{note}</p>"


def _map(found: Mapping[str, Any] | None, points: Points | None, sources: Sequence[str]) -> str:
    """The corpus in the plane, and its clusters with documents to read."""
    if not found:
        return ""
    figure = curation_plots.corpus_map(points, curation_plots.colours(sources)) if points is not None else None
    largest = sorted(enumerate(found["clusters"]), key=lambda item: (-item[1]["documents"], item[0]))[:CLUSTERS]
    parts = [picture(style.png(figure), "map")] if figure else []
    for number, of in largest:
        by_source = sorted(of["sources"].items(), key=lambda item: (-item[1], item[0]))
        shares = ", ".join(f"{name} {count / max(of['documents'], 1):.0%}" for name, count in by_source)
        note = f"{of['documents']:,} documents, {of['kept']:,} kept: {shares}"
        shown = "".join(document(one["name"], one["source"], one["text"]) for one in of["samples"])
        parts.append(folded(f"Cluster {number + 1}", shown, note))
    return "".join(parts)


def _map_note(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    shares = " and ".join(f"{share:.0%}" for share in found["map"]["variance"])
    directions = f"Directions of the largest variance ({found['map']['method']}; {shares} of it), vectors: {found['embedding']}."
    return html.escape(f"{directions} Documents of a cluster are those nearest to its center.")


def _assembled(found: Mapping[str, Any]) -> str:
    rows: list[tuple[Sequence[Cell], str]] = []
    for name, of in found.items():
        before, after = (of["lengths"][when] for when in ("before", "after"))
        left = sum(one["documents"] for one in of["left_over"].values())
        cells = (
            (name, f"{of['method']} of {', '.join(of['sources'])}"), f"{of['in']['documents']:,}", f"{of['out']['documents']:,}",
            size(of["out"]["bytes"]), f"{before['median']:,.0f} → {after['median']:,.0f} {of['unit']}", f"{left:,}",
        )  # fmt: skip
        rows.append((cells, ""))
    return table(("source", "made of", "documents", "text", "median length", "left over"), rows) if rows else ""


def _synthesized(found: Mapping[str, Any]) -> str:
    """What was made of what, at what price, and answers to read."""
    rows: list[tuple[Sequence[Cell], str]] = []
    for name, of in found.items():
        left = sum(one["documents"] for one in of["left_over"].values())
        made = f"{of.get('task', of['method'])} of {', '.join(of['sources'])}" + (f", by {of['model']}" if "model" in of else "")
        cells: list[Cell] = [(name, made), f"{of['in']['documents']:,}", f"{of['out']['documents']:,}", size(of["out"]["bytes"])]
        rows.append(([*cells, *_spent(of), f"{left:,}"], ""))
    if not rows:
        return ""
    heads = ("source", "documents", "written", "text", "requests", "of use", "tokens in → out", "cost", "left over")
    asked = {name: of for name, of in found.items() if "answers" in of}
    most = max(1, DOCUMENTS // (4 * max(len(asked), 1)))
    return table(heads, rows) + "".join(_answers(name, of, most) for name, of in asked.items())


def _spent(of: Mapping[str, Any]) -> list[str]:
    """Requests, answers of use, tokens and cost of a source that a model wrote."""
    if "answers" not in of:
        return ["–"] * 4
    tokens, total = of["tokens"], sum(of["answers"].values())
    about = "about " if tokens["estimated_requests"] else ""
    cost = "not known" if of["cost"] is None else f"{of['cost']:,.4g}"
    used = of["answers"].get("used", 0)
    return [
        f"{of['requests']:,}", f"{used / max(total, 1):.1%}", f"{about}{tokens['input']:,} → {tokens['output']:,}", cost,
    ]  # fmt: skip


def _answers(name: str, of: Mapping[str, Any], most: int) -> str:
    reasons = ", ".join(f"{reason.replace('_', ' ')} {count:,}" for reason, count in of["answers"].items())
    left = ", ".join(f"{reason.replace('_', ' ')} {one['documents']:,}" for reason, one in of["left_over"].items())
    shown = ""
    for used in (True, False):
        for one in [one for one in of["samples"] if (one["outcome"] == "used") == used][:most]:
            outcome = one["outcome"].replace("_", " ")
            shown += document(one["name"], f"{outcome} · what the model saw", one["before"])
            shown += document("", "what it wrote", one["after"])
    note = f"answers: {reasons or 'none'}" + (f"; documents left over: {left}" if left else "")
    return folded(name, shown, note)


def _settings(config: Mapping[str, Any] | None) -> str:
    text = json.dumps(config, indent=1, ensure_ascii=False) if config else ""
    return folded("curation.json", f"<pre>{html.escape(text)}</pre>") if config else ""
