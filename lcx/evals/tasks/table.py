"""The benchmarks by name; a new one is a file in this folder and a row here."""

from __future__ import annotations

from collections.abc import Callable

from lcx.evals.base import Materials, Task
from lcx.evals.tasks import ruler_niah
from lcx.evals.tasks.needles import GeneratedNeedles, Needles
from lcx.evals.tasks.perplexity import Perplexity
from lcx.evals.tasks.ruler_counting import CommonWords, FrequentWords
from lcx.evals.tasks.ruler_qa import DocumentQuestions
from lcx.evals.tasks.ruler_tracing import VariableTracking

TASKS: dict[str, Callable[[Materials], Task | None]] = {
    "needles": Needles.build,
    "generated_needles": GeneratedNeedles.build,
    "perplexity": Perplexity.build,
    "ruler_niah_single_1": ruler_niah.Needles.row("ruler_niah_single_1", haystack="noise"),
    "ruler_niah_single_2": ruler_niah.Needles.row("ruler_niah_single_2", haystack="essay"),
    "ruler_niah_single_3": ruler_niah.Needles.row("ruler_niah_single_3", haystack="essay", value="uuids"),
    "ruler_niah_multikey_1": ruler_niah.Needles.row("ruler_niah_multikey_1", haystack="essay", keys=4),
    "ruler_niah_multikey_2": ruler_niah.Needles.row("ruler_niah_multikey_2", haystack="needles"),
    "ruler_niah_multikey_3": ruler_niah.Needles.row("ruler_niah_multikey_3", haystack="needles", key="uuids", value="uuids"),
    "ruler_niah_multivalue": ruler_niah.Needles.row("ruler_niah_multivalue", haystack="essay", values=4),
    "ruler_niah_multiquery": ruler_niah.Needles.row("ruler_niah_multiquery", haystack="essay", queries=4),
    "ruler_vt": VariableTracking.row("ruler_vt"),
    "ruler_cwe": CommonWords.row("ruler_cwe"),
    "ruler_fwe": FrequentWords.row("ruler_fwe"),
    "ruler_qa_1": DocumentQuestions.row("ruler_qa_1", setting="qa_1"),
    "ruler_qa_2": DocumentQuestions.row("ruler_qa_2", setting="qa_2"),
}
"""Each makes its task of what an evaluation is made from; None leaves it out."""

GROUPS = {"ruler": tuple(name for name in TASKS if name.startswith("ruler_"))}
"""Several at once."""
