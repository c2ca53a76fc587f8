"""The HTML shell of reports: inline style for light and dark, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

Cell = str | tuple[str, str]

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --muted: #66727f; --line: #e3e8ee; --paper: #ffffff; --ground: #f6f8fa;
  --accent: #0a8f6e; --code: #f1f4f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --muted: #94a1ae; --line: #2c3641; --paper: #171d24;
  --ground: #0f1419; --accent: #2ad4a5; --code: #10161c; } figure { filter: brightness(.93); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "DejaVu Sans", sans-serif; -webkit-font-smoothing: antialiased; }
main { max-width: 980px; margin: 0 auto; padding: 44px 20px 72px; }
h1 { font-size: 40px; line-height: 1.15; letter-spacing: -.02em; margin: 0; font-weight: 700; }
.lead { color: var(--muted); font-size: 17px; margin: 10px 0 28px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; margin-bottom: 16px; }
.tile, section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 14px 16px 13px; }
.tile .caption { color: var(--muted); font-size: 13px; }
.tile .value { font-size: 23px; font-weight: 650; letter-spacing: -.01em; margin: 3px 0 4px; color: var(--accent);
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile .small { color: var(--muted); font-size: 12.5px; line-height: 1.4; }
section { padding: 20px 22px 18px; margin-top: 16px; }
h2 { font-size: 17px; margin: 0 0 14px; letter-spacing: -.005em; }
figure { margin: 0 0 12px; background: #fff; border-radius: 8px; padding: 12px; }
figure img { display: block; width: 100%; height: auto; }
.note { color: var(--muted); font-size: 13.5px; margin: 10px 0 0; max-width: 78ch; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-weight: 500; text-align: right; border-bottom: 1px solid var(--line); padding: 6px 10px; }
td { text-align: right; border-bottom: 1px solid var(--line); padding: 7px 10px; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
td span { color: var(--muted); font-size: 12.5px; font-weight: 400; display: inline-block; min-width: 42px; }
.words td:first-child { white-space: nowrap; }
.words th:last-child, .words td:last-child { text-align: left; white-space: normal; padding-left: 22px; }
.answers td:last-child { white-space: pre-wrap; }
tr.dim td { color: var(--muted); }
tr.strong td { font-weight: 650; color: var(--accent); }
pre { background: var(--code); border-radius: 8px; padding: 12px 14px; overflow-x: auto; font: 12.5px/1.5 ui-monospace,
  SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; margin: 0 0 12px; }
pre.passage { white-space: pre-wrap; font-size: 13.5px; line-height: 1.7; }
summary { cursor: pointer; color: var(--muted); font-size: 13.5px; margin: 12px 0 8px; overflow-wrap: anywhere; }
summary b { color: var(--ink); font-weight: 600; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); gap: 0 12px; }
.panels figure { padding: 8px; max-width: 520px; }
h3 { font-size: 14px; margin: 22px 0 8px; font-weight: 650; }
.document { border-left: 3px solid var(--line); padding: 1px 0 1px 12px; margin: 12px 0; }
.document .name { font-size: 13.5px; font-weight: 600; overflow-wrap: anywhere; }
.document .facts { color: var(--muted); font-size: 12.5px; overflow-wrap: anywhere; }
.document pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0 0; padding: 8px 10px; font-size: 12px; }
footer { color: var(--muted); font-size: 13px; margin-top: 24px; }
@media (max-width: 560px) { h1 { font-size: 30px; } section { padding: 16px 14px; } }
@media print { body { background: none; } section { break-inside: avoid; } }
"""


_FOOTER = "Written by lcx from the files in this run's folder; every number comes from them."


def page(
    title: str,
    heading: str,
    lead: str,
    tiles: Sequence[tuple[str, str, str]],
    body: str,
    footer: str = _FOOTER,
    extra_style: str = "",
) -> str:
    """A whole document; `tiles` are (caption, value, small print) and `footer` plain text, `body` is HTML, `extra_style` CSS."""
    shown = "".join(
        f"<div class=tile><div class=caption>{html.escape(caption)}</div><div class=value>{html.escape(value)}</div>"
        f"<div class=small>{html.escape(small)}</div></div>"
        for caption, value, small in tiles
    )
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}{extra_style}</style></head><body><main>"
        f"<h1>{html.escape(heading)}</h1><p class=lead>{html.escape(lead)}</p><div class=tiles>{shown}</div>{body}"
        f"<footer>{html.escape(footer)}</footer>"
        "</main></body></html>\n"
    )


def table(heads: Sequence[str], rows: Iterable[tuple[Sequence[Cell], str]]) -> str:
    """HTML of a table; rows are (cells, class); a cell is text, or text with a muted note."""

    def inside(cell: Cell) -> str:
        return html.escape(cell) if isinstance(cell, str) else f"{html.escape(cell[0])} <span>{html.escape(cell[1])}</span>"

    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join(f"<tr class='{kind}'>" + "".join(f"<td>{inside(cell)}</td>" for cell in cells) + "</tr>" for cells, kind in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def sections(parts: Iterable[tuple[str, str, str]]) -> str:
    """HTML of the sections that have content; parts are (title, content, note), the title in plain text."""
    return "".join(
        f"<section><h2>{html.escape(title)}</h2>{content}{f'<p class=note>{note}</p>' if note else ''}</section>"
        for title, content, note in parts
        if content
    )


def picture(png: bytes, name: str) -> str:
    """HTML of an image that the page itself holds."""
    return f"<figure><img alt='{html.escape(name)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'></figure>"


def panels(pngs: Iterable[tuple[str, bytes]]) -> str:
    """HTML of (name, image) side by side where there is room, below one another where there is none; empty without images."""
    shown = "".join(picture(png, name) for name, png in pngs)
    return f"<div class=panels>{shown}</div>" if shown else ""


def folded(summary: str, content: str, note: str = "", is_open: bool = False) -> str:
    """HTML of content under a line that opens it; `summary` and `note` are plain text."""
    head = f"<summary><b>{html.escape(summary)}</b> {html.escape(note)}</summary>"
    return f"<details{' open' if is_open else ''}>{head}{content}</details>"


def document(name: str, facts: str, text: str) -> str:
    """HTML of a document to read: its name, what is known of it, and the start of its text; what is empty is left out."""
    shown = f"<pre>{html.escape(text, quote=False)}</pre>" if text else ""
    heads = ((kind, content) for kind, content in (("name", name), ("facts", facts)) if content)
    named = "".join(f"<div class={kind}>{html.escape(content)}</div>" for kind, content in heads)
    return f"<div class=document>{named}{shown}</div>"
