"""The benchmarks by name; a new one is a file in this folder and a row here."""

from __future__ import annotations

from collections.abc import Callable

from lcx.evals.base import Materials, Task
from lcx.evals.readers.files import FileQuestions
from lcx.evals.readers.table import BENCHMARKS
from lcx.evals.tasks.babilong import KINDS, Babilong
from lcx.evals.tasks.copying import Induction, RepeatedWords
from lcx.evals.tasks.coreference import RepeatTurn
from lcx.evals.tasks.counting import LabelCounts
from lcx.evals.tasks.graphwalks import GraphWalks
from lcx.evals.tasks.infinitebench import FindNumber, RunCode, RunningSum
from lcx.evals.tasks.key_tokens import KeyTokens
from lcx.evals.tasks.key_value_pairs import KeyValuePairs
from lcx.evals.tasks.loss_by_kind import LossByKind, LossBySource
from lcx.evals.tasks.many_shot import ManyShot
from lcx.evals.tasks.needle_in_prose import NeedleInProse, Passkey
from lcx.evals.tasks.needles import GeneratedNeedles, Needles
from lcx.evals.tasks.perplexity import Perplexity
from lcx.evals.tasks.ruler_counting import CommonWords, FrequentWords
from lcx.evals.tasks.ruler_niah import HiddenValues
from lcx.evals.tasks.ruler_qa import DocumentQuestions
from lcx.evals.tasks.ruler_tracing import VariableTracking
from lcx.evals.tasks.ruler_v2 import BasicNeedles
from lcx.evals.tasks.session_state import LatentList, SessionState
from lcx.evals.text.questions import TextQuestions

WORDS: dict[str, tuple[type[TextQuestions], dict]] = {
    "needle_in_prose": (NeedleInProse, {}),
    "single_needle_in_prose": (NeedleInProse, {"single": True}),
    "passkey": (Passkey, {}),
    "key_value": (KeyValuePairs, {}),
    "json_kv": (KeyValuePairs, {"demonstrations": 2}),
    "induction": (Induction, {}),
    "repeated_words": (RepeatedWords, {}),
    "many_shot": (ManyShot, {}),
    "session_state": (SessionState, {}),
    "latent_list": (LatentList, {}),
    "label_counts": (LabelCounts, {}),
    "ruler_niah_single_1": (HiddenValues, {"haystack": "noise"}),
    "ruler_niah_single_2": (HiddenValues, {"haystack": "essay"}),
    "ruler_niah_single_3": (HiddenValues, {"haystack": "essay", "value": "uuids"}),
    "ruler_niah_multikey_1": (HiddenValues, {"haystack": "essay", "keys": 4}),
    "ruler_niah_multikey_2": (HiddenValues, {"haystack": "needles"}),
    "ruler_niah_multikey_3": (HiddenValues, {"haystack": "needles", "key": "uuids", "value": "uuids"}),
    "ruler_niah_multivalue": (HiddenValues, {"haystack": "essay", "values": 4}),
    "ruler_niah_multiquery": (HiddenValues, {"haystack": "essay", "queries": 4}),
    "ruler_vt": (VariableTracking, {}),
    "ruler_cwe": (CommonWords, {}),
    "ruler_fwe": (FrequentWords, {}),
    "ruler_qa_1": (DocumentQuestions, {"setting": "qa_1"}),
    "ruler_qa_2": (DocumentQuestions, {"setting": "qa_2"}),
    "ruler2_mk_basic": (BasicNeedles, {}),
    "ruler2_mv_basic": (BasicNeedles, {"values": 4}),
    "ruler2_nth_of_four": (BasicNeedles, {"values": 4, "nth": True}),
    **{f"babilong_{kind}": (Babilong, {"kind": kind}) for kind in KINDS},
    "infinitebench_number": (Passkey, {"repeats": True}),
    "infinitebench_find": (FindNumber, {}),
    "infinitebench_sum": (RunningSum, {}),
    **{f"infinitebench_code_{levels}": (RunCode, {"levels": levels}) for levels in (2, 4, 6, 8, 10)},
    "graphwalks_parents": (GraphWalks, {"distance": 0}),
    **{f"graphwalks_bfs_{distance}": (GraphWalks, {"distance": distance}) for distance in (1, 2, 3)},
    **{f"mrcr_{needles}": (RepeatTurn, {"needles": needles}) for needles in (2, 4, 8)},
}
"""Questions in words: the class of a task, and its settings."""

TASKS: dict[str, Callable[[Materials], Task | None]] = {
    "needles": Needles.build,
    "generated_needles": GeneratedNeedles.build,
    "perplexity": Perplexity.build,
    "long_perplexity": KeyTokens.build,
    "loss_by_kind": LossByKind.build,
    "loss_by_source": LossBySource.build,
    **{name: kind.row(name, **settings) for name, (kind, settings) in WORDS.items()},
    **{name: FileQuestions.row(name, benchmark) for name, benchmark in BENCHMARKS.items()},
}
"""Each makes its task of what an evaluation is made from; None leaves it out."""

GROUPS = {
    group: tuple(name for name in WORDS if name.startswith(f"{group}_"))
    for group in ("ruler", "ruler2", "babilong", "infinitebench", "graphwalks", "mrcr")
}
"""Several at once, with their average."""
