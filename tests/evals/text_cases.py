"""Readers that answer questions by program, and what tasks are made from in tests."""

from __future__ import annotations

import collections
import json
import re
from pathlib import Path

import sentencepiece
import tokenizers as library

from lcx.data.config import DataConfig
from lcx.data.tokenizers import tokenizers
from lcx.evals.base import Item, Materials
from lcx.evals.config import EvalConfig, QuestionConfig
from lcx.evals.tasks.table import GROUPS, TASKS
from lcx.evals.text.prose import standard_library
from lcx.evals.text.questions import TextQuestions

RULER = GROUPS["ruler"]
NEEDLES = tuple(name for name in RULER if "niah" in name)


def squad(path: Path, articles: int = 8, paragraphs: int = 12) -> str:
    """A file laid out like SQuAD's, each of whose questions only its own paragraph answers."""
    made = [
        {
            "paragraphs": [
                {
                    "context": f"The harbour of town {a}-{p} was built long ago. Its keeper is called Keeper{a}x{p}y. "
                    + "Ships call. " * 20,
                    "qas": [
                        {"question": f"Who keeps the harbour of town {a}-{p}?", "answers": [{"text": f"Keeper{a}x{p}y"}] * 2},
                        {"question": "Who keeps nothing?", "answers": [], "is_impossible": True},
                    ],
                }
                for p in range(paragraphs)
            ]
        }
        for a in range(articles)
    ]
    path.write_text(json.dumps({"version": "v2.0", "data": made}))
    return str(path)


def hotpot(path: Path, items: int = 30) -> str:
    """A file laid out like HotpotQA's, whose answers take one of the ten documents of an item."""
    made = [
        {
            "question": f"Which river flows past hill {i}?",
            "answer": f"River{i}z",
            "supporting_facts": [[f"Hill {i}", 0]],
            "context": [[f"Hill {i}", [f"Hill {i} is green. ", f"River{i}z flows past it."]]]
            + [[f"Hill {i}-{j}", [f"Hill {i}-{j} is bare. ", "No river is near. " * 10]] for j in range(9)],
        }
        for i in range(items)
    ]
    path.write_text(json.dumps(made))
    return str(path)


def task(name: str, folder: Path, tokenizer: str = "bytes", samples: int = 10, **settings) -> TextQuestions:
    """A row of the table."""
    questions = QuestionConfig(samples, qa_1=squad(folder / "squad.json"), qa_2=hotpot(folder / "hotpot.json"), **settings)
    made = TASKS[name](Materials(EvalConfig(questions=questions), DataConfig(), tokenizers.load(tokenizer), None))
    assert isinstance(made, TextQuestions)
    return made


def read(name: str, text: str) -> str:
    """What a reader answers that sees `text`, the end of a prompt or all of it."""
    kind = re.sub(r"_(single|multi).*", "", name.removeprefix("ruler_"))
    return {"niah": _needles, "vt": _chain, "cwe": _common, "fwe": _frequent, "qa_1": _keeper, "qa_2": _river}[kind](text)


def _needles(text: str) -> str:
    query = re.search(r"The special magic \w+ for ([^\n]+?) that the text above mentions (?:is|are)$", text)[1]
    keys = re.split(r", and |, ", query)
    found = [re.findall(rf"special magic \w+ for {re.escape(key)} is: ([\w-]+)\.", text) for key in keys]
    return ", ".join(value for values in found for value in values)


def _chain(text: str) -> str:
    value = re.search(r"assigned the value (\d+), they are:$", text)[1]
    known = set()
    for name, right in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", text):
        if right == value or right in known:
            known.add(name)
    return " ".join(known)


def _common(text: str) -> str:
    listed = text[: text.rindex("\nQuestion:")].rpartition("occur most often.\n")[2]
    return " ".join(word for word, _ in collections.Counter(re.findall(r"\d+\. ([a-z]+)", listed)).most_common(10))


def _frequent(text: str) -> str:
    coded = text[: text.rindex("\nQuestion:")].rpartition("give no explanation.\n")[2]
    return " ".join(word for word, _ in collections.Counter(re.findall(r"\b[a-z]{6}\b", coded)).most_common(3))


def _keeper(text: str) -> str:
    town = re.findall(r"harbour of town (\d+)-(\d+)\?", text)[-1]
    found = re.search("town {}-{} was built long ago. Its keeper is called (\\w+)".format(*town), text)
    return found[1] if found else ""


def _river(text: str) -> str:
    hill = re.findall(r"past hill (\d+)\?", text)[-1]
    found = re.search(rf"Hill {hill} is green\. (\w+)", text)
    return found[1] if found else ""


class Reader:
    """A backend that sees the last `share` of each prompt's characters."""

    scheme, fingerprint, batch = "none", "reader", 3

    def __init__(self, name: str, share: float = 1.0) -> None:
        self.name, self.share, self.asked = name, share, 0

    def complete(self, items: list[Item], new_tokens: int) -> list[str]:
        """Answers by program."""
        self.asked += len(items)
        return [read(self.name, item.text[-round(len(item.text) * self.share) :]) for item in items]


def bpe(folder: Path) -> str:
    """A byte-level BPE trained on prose, as a `tokenizer.json`."""
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(standard_library().take(0, 20_000), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def pieces(folder: Path) -> str:
    """A SentencePiece BPE with byte fallback, as Llama 2's, which begins a text with begin-of-sequence."""
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(standard_library().take(0, 20_000)), model_writer=file, vocab_size=2000, model_type="bpe",
            byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
            minloglevel=2,
        )  # fmt: skip
    return str(folder)
