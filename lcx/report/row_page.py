"""Rows of a mixture as HTML: every token shaded by the weight of the loss on it, with special tokens and bounds of documents."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from lcx.data.row_text import RowText, Span, Token
from lcx.report.page import document, folded

SHADES = 8
"""Weights that have a shade of their own; more are put into as many steps."""

STYLE = """
pre.row { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 420px; overflow-y: auto; line-height: 1.6; }
.row .bound { display: block; color: var(--muted); border-top: 1px dashed var(--muted); margin: 5px 0 2px; padding-top: 3px;
  font: 11.5px/1.4 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.row .gap { display: block; color: var(--muted); margin: 6px 0; }
.row span, .legend span { border-radius: 2px; }
.row b { font-weight: 600; border: 1px solid var(--muted); border-radius: 4px; padding: 0 3px; margin: 0 1px; }
.row i { font-style: normal; border-bottom: 2px dotted var(--accent); }
.w0 { color: var(--muted); }
.legend { display: flex; flex-wrap: wrap; gap: 6px 14px; font-size: 13px; margin: 0 0 10px; }
.legend span { padding: 1px 7px; margin-right: 5px; border: 1px solid var(--line); }
"""


def shades(rows: Sequence[RowText]) -> list[tuple[float, float]]:
    """The (lowest, highest) weight of each shade above 0, ascending: each weight has its own, or a step of the range."""
    weights = np.unique(np.concatenate([np.zeros(1, np.float32), *(row.weights for row in rows)]))
    above = weights[weights > 0].tolist()
    if len(above) <= SHADES:
        return [(weight, weight) for weight in above]
    return [(float(group[0]), float(group[-1])) for group in np.array_split(above, SHADES)]


def style_of(steps: Sequence[tuple[float, float]]) -> str:
    """CSS with the colour of each shade, `w1` for the lowest."""
    count = max(len(steps), 2)
    return STYLE + "".join(
        f".w{i} {{ background: rgb(10 154 118 / {0.12 + 0.5 * i / count:.2f}); }}\n" for i in range(1, len(steps) + 1)
    )


def legend(steps: Sequence[tuple[float, float]]) -> str:
    """HTML that says what the shades and marks mean."""
    named = [("w0", "no loss")]
    named += [
        (f"w{i}", f"loss weight {low:g}" if low == high else f"loss weight {low:g}–{high:g}")
        for i, (low, high) in enumerate(steps, 1)
    ]
    shown = "".join(f"<div><span class={kind}>abc</span>{html.escape(text)}</div>" for kind, text in named)
    marks = "<div><b>&lt;s&gt;</b> special token</div><div><i>abc</i> predicted by the last token, not in the row</div>"
    return f"<div class='legend row'>{shown}{marks}</div>"


def rows_html(rows: Sequence[RowText]) -> str:
    """HTML of the rows, part by part, the first of each part open."""
    steps, parts = shades(rows), [legend(shades(rows))]
    for part, group in itertools.groupby(rows, key=lambda row: row.part):
        parts.append(f"<h3>{html.escape(part)}</h3>")
        for i, row in enumerate(group):
            length = len(row.weights)
            filled = f"{row.filled:,} of {length:,} places filled" if row.filled < length else f"{length:,} tokens"
            trained = int((row.weights > 0).sum())
            facts = f"{filled}, {trained:,} with loss, sum of weights {weight_sum(float(row.weights.sum(dtype=np.float64)))}"
            # Of packed text the bounds of documents say it.
            about = "" if row.spans else document("", row.about, "")
            body = f"{about}<pre class=row>{''.join(_content(row, steps))}</pre>"
            parts.append(folded(f"Step {row.step + 1}, row {row.row + 1}", body, facts, is_open=i == 0))
    return "".join(parts)


def weight_sum(value: float) -> str:
    """A sum of loss weights."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _content(row: RowText, steps: Sequence[tuple[float, float]]) -> Iterable[str]:
    """The row's tokens in runs, with bounds and gaps between them."""
    spans, at = list(row.spans), 0
    for token_class, run in _runs(row.tokens, steps, {span.start for span in row.spans}):
        first, last = run[0], run[-1]
        if first.place > at and not first.is_target:
            yield f"<span class=gap>… {first.place - at:,} tokens …</span>"
        while spans and spans[0].start <= first.place:
            yield _bound(spans.pop(0))
        yield _run(token_class, run)
        at = last.place + 1
    if at < row.filled:
        yield f"<span class=gap>… {row.filled - at:,} tokens …</span>"
    if row.filled < len(row.weights):
        yield f"<span class=bound>{len(row.weights) - row.filled:,} places of padding</span>"


def _runs(tokens: Iterable[Token], steps: Sequence[tuple[float, float]], starts: set[int]) -> Iterable[tuple[str, list[Token]]]:
    """Neighbours of one weight and kind, with the class of their shade; a document begins a run."""
    run: list[Token] = []
    for token in tokens:
        alike = run and (token.weight, token.special, token.is_target) == (run[-1].weight, run[-1].special, run[-1].is_target)
        if run and (not alike or token.place != run[-1].place + 1 or token.place in starts):
            yield _shade(run[0].weight, steps), run
            run = []
        run.append(token)
    if run:
        yield _shade(run[0].weight, steps), run


def _shade(weight: float, steps: Sequence[tuple[float, float]]) -> str:
    return f"w{next((i for i, (low, high) in enumerate(steps, 1) if low <= weight <= high), 0)}"


def _run(shade: str, run: Sequence[Token]) -> str:
    first, last = run[0], run[-1]
    places = f"token {first.place}" if first is last else f"tokens {first.place}–{last.place}"
    title = "predicted by the last token" if first.is_target else places
    text = "".join(f"<b>{_shown(token.text)}</b>" if token.special else _shown(token.text) for token in run)
    inside = f"<i>{text}</i>" if first.is_target else text
    return f"<span class={shade} title='{title}, loss weight {first.weight:g}'>{inside}</span>"


_CONTROL = {code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)} | {127: "\u2421"}


def _shown(text: str) -> str:
    """The text for HTML, with pictures for control characters."""
    return html.escape(text.translate(_CONTROL))


def _bound(span: Span) -> str:
    """A line that says which document begins."""
    whole = span.first == 0 and span.last == span.length
    taken = f"all of its {span.length:,} tokens" if whole else f"tokens {span.first:,} to {span.last:,} of {span.length:,}"
    first, last = span.positions
    positions = "" if (first, last) == (span.start, span.end - 1) else f", positions {first:,} to {last:,}"
    return f"<span class=bound>{html.escape(f'{span.name}: {taken}{positions}')}</span>"
