"""HELMET (Yen et al., 2410.02694): recall and RAG from its files, and ICL from files of the datasets that it draws from."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from lcx.core.errors import UserError
from lcx.evals.base import Item, Materials
from lcx.evals.readers import scores
from lcx.evals.readers.files import Files, Fitted, Placed, Question, Row, laid_out, matching, records
from lcx.evals.text.formats import PromptFormat, Sample
from lcx.evals.text.matching import share_contained
from lcx.evals.text.questions import Draw, TextQuestions

MOST = 100
"""Rows that are drawn from each file, as the benchmark draws questions; a file has thousands."""
SHOTS = 2
"""Solved examples in each prompt of recall and RAG."""
LEAST_POPULAR = 1000
"""PopQA's questions are those about subjects that are looked up less often than this a month."""


# ---- recall
def json_kv(row: Row) -> Question:
    """`context` is a JSON object, `question` a key of it, `answer` its value, and `demos` are pairs of it."""
    solved = "".join(f"Key: {key}\nValue: {value}\n\n" for key, value in row["demos"][:SHOTS])
    prompt = f"{row['context']}\n\nWrite the value that the JSON object above has for a key.\n\n{solved}Key: {row['question']}"
    return _asked(prompt, "\nValue:", _texts(row["answer"]), 100, scores.contained)


def niah(new_tokens: int, row: Row) -> Question:
    """RULER's needles: `context`, `query` (keys), `type_needle_v` (what values are) and the values, as `answer` or `outputs`."""
    what = row["type_needle_v"]
    prompt = (
        f"Special magic {what} are hidden in the text below. Memorise them; you will be asked for some.\n{row['context']}\n"
        f"Which special magic {what} does the text name for {row['query']}?"
    )
    prefix = f"\nThe special magic {what} for {row['query']}:"
    return _asked(prompt, prefix, _texts(row["answer"] if "answer" in row else row["outputs"]), new_tokens, share_contained)


# ---- RAG
def rag(row: Row) -> Question:
    """`ctxs` are documents of a `title` and a `text`; `answers` are all right ones. Solved examples are rows of the same layout."""
    others = {example["question"]: example for example in row["examples"] if example["question"] != row["question"]}
    chosen = random.Random(row["question"]).sample(sorted(others), min(SHOTS, len(others)))
    solved = [f"{_documents(others[text])}\nAnswer: {_texts(others[text]['answers'])[0]}\n\n" for text in chosen]
    prompt = f"Answer the question in a few words, from the documents before it.\n\n{''.join(solved)}{_documents(row)}"
    return _asked(prompt, "\nAnswer:", _texts(row["answers"]), 20, scores.of_first_line(scores.contained))


def _documents(row: Row) -> str:
    listed = [f"Document: {document['title']}\n{document['text']}" for document in row["ctxs"]]
    return "\n\n".join((*listed, f"Question: {row['question']}"))


def unpopular(rows: Iterable[Placed]) -> Iterator[Placed]:
    """PopQA's rows whose subjects are looked up seldom (`s_pop`)."""
    for place, row in rows:
        with laid_out(place, row):
            wanted = float(row["s_pop"]) < LEAST_POPULAR
        if wanted:
            yield place, row


def _texts(answers: str | Sequence) -> tuple[str, ...]:
    """All answers of one, of a list, or of a list of lists."""
    if isinstance(answers, str):
        return (answers,)
    return tuple(itertools.chain.from_iterable(map(_texts, answers)))


def _asked(prompt: str, prefix: str, references: tuple[str, ...], new_tokens: int, score: Callable[..., float]) -> Question:
    if not references:
        raise ValueError("no answer")
    return Question(Sample(prompt, prefix, references), new_tokens, functools.partial(score, references=references))


# ---- ICL
@dataclasses.dataclass(frozen=True)
class InContextLearning(TextQuestions):
    """The class of a text, learned from as many labelled ones as fit. Classes are numbers, drawn anew for each sample.

    A unit is a labelled text. They come in rounds, of one text of each class in random order; texts that are asked about are of all
    classes alike. `shots` and `asked` hold texts by class.
    """

    shots: Mapping[str, Sequence[str]]
    asked: Mapping[str, Sequence[str]]

    answer_tokens = 20
    units_per_1024 = 40
    counts = "shots"

    def compose(self, draw: Draw, units: int) -> Sample:
        """The text that is asked about does not depend on the number of shots, nor do the first ones."""
        rng, classes = draw.rng, list(self.shots)
        wanted = rng.choice(list(self.asked))
        text = rng.choice(self.asked[wanted])
        numbers = dict(zip(classes, rng.sample(range(len(classes)), len(classes)), strict=True))
        order = {key: rng.sample(self.shots[key], len(self.shots[key])) for key in classes}
        listed: list[str] = []
        for turn in itertools.count():
            if len(listed) >= units:
                break
            for key in rng.sample(classes, len(classes)):
                listed.append(f"{order[key][turn % len(order[key])]}\nlabel: {numbers[key]}")
        prompt = "\n\n".join(("Give the last text the label of its kind, as texts before it have.", *listed[:units], text))
        return Sample(prompt, "\nlabel:", (str(numbers[wanted]),))

    def score(self, item: Item, output: str) -> float:
        """1 if the first line is the label, behind "label:" or alone."""
        return scores.of_first_line(scores.labelled)(output, item.references)

    def guess(self, items: Sequence[Item]) -> float:
        """One over the number of classes."""
        return 1 / len(self.shots)


ICL: dict[str, tuple[tuple[str, ...], str, str | None]] = {
    "trec_coarse": (("trec",), "coarse_label", "test"),
    "trec_fine": (("trec",), "fine_label", "test"),
    "banking77": (("banking77",), "label", "test"),
    "clinic150": (("clinc_oos/plus", "clinc_oos"), "intent", "validation"),
    "nlu": (("nlu_evaluation_data",), "label", None),
}
"""Folders of a dataset, the field of its classes, and the split that is asked about (None: a tenth of the training split)."""
ICL_ORIGIN = "those of ICL from CogComp/trec, PolyAI/banking77, clinc/clinc_oos and xingkunliuxtracta/nlu_evaluation_data"


def _split(folders: Sequence[str], split: str) -> tuple[str, ...]:
    ends = (f"{split}*.parquet", f"{split}/*.parquet", f"{split}*.jsonl")
    return tuple(f"**/{folder}/**/{end}" for folder in folders for end in ends)


def in_context(dataset: str, name: str, materials: Materials, format: PromptFormat, root: pathlib.Path) -> InContextLearning | None:
    """The questions of a dataset, of rows with a `text` and a class; None if its files are not there."""
    folders, field, split = ICL[dataset]
    train = _labelled(matching(root, _split(folders, "train")), field)
    if not train:
        return None
    if split is None:
        random.Random(name).shuffle(train)
        asked, train = train[: len(train) // 10], train[len(train) // 10 :]
    else:
        asked = _labelled(matching(root, _split(folders, split)), field)
    shots, wanted = _by_class(train), _by_class(asked)
    wanted = {key: texts for key, texts in wanted.items() if key in shots}
    if not wanted:
        raise UserError(f"{name} asks about {split or 'training'} texts, of which {root} has none; fetch {folders[0]} in full")
    return InContextLearning(name, format, materials.config.questions, materials.config.seed, shots, wanted)


def _labelled(paths: Iterable[pathlib.Path], field: str) -> list[tuple[str, str]]:
    found = []
    for place, row in itertools.chain.from_iterable(map(records, paths)):
        with laid_out(place, row):
            found.append((str(row[field]), row["text"].strip()))
    return found


def _by_class(rows: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, text in rows:
        found.setdefault(key, []).append(text)
    return found


def _kilt(test: str, train: str, depths: int, arrange: Callable[[Iterable[Placed]], Iterable[Placed]] | None = None) -> Files:
    # Files of three documents a question are the solved examples.
    patterns, examples = f"**/{test}_1000_k[!3]*_dep{depths}.jsonl", f"**/{train}_1000_k3_dep{depths}.jsonl"
    return Files((patterns,), rag, arrange, (examples,), MOST)


PARTS: Mapping[str, Files | Fitted] = {
    "json_kv": Files(("**/json_kv/test_k*_dep6.jsonl",), json_kv, most=MOST),
    **{
        f"niah_{kind}": Files((f"**/niah_{folder}/validation_*.jsonl",), functools.partial(niah, new_tokens), most=MOST)
        for kind, folder, new_tokens in (("mk_2", "multikey_2", 50), ("mk_3", "multikey_3", 100), ("mv", "multivalue", 50))
    },
    "nq": _kilt("nq-dev-multikilt", "nq-train-multikilt", 6),
    "triviaqa": _kilt("triviaqa-dev-multikilt", "triviaqa-train-multikilt", 6),
    "hotpotqa": _kilt("hotpotqa-dev-multikilt", "hotpotqa-train-multikilt", 3),
    "popqa": _kilt("popqa_test", "popqa_test", 6, unpopular),
    **{
        f"icl_{dataset}": Fitted(_split(folders, "train"), functools.partial(in_context, dataset))
        for dataset, (folders, _, _) in ICL.items()
    },
}
