"""Readers that answer questions by program, and what tasks are made from in tests."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterator
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
    """What a reader answers that sees `text`, the end of a prompt or all of it; nothing where it does not see what it needs."""
    for beginning in sorted(READERS, key=len, reverse=True):
        if name.startswith(beginning):
            return READERS[beginning](text)
    raise KeyError(name)


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


def _chosen(text: str) -> str:
    who = re.findall(r"did the keeper of the (\w+ \w+) choose\?", text)[-1]
    found = re.search(rf"The keeper of the {who} chose the number (\d+)\.", text)
    return found[1] if found else ""


def _passkey(text: str) -> str:
    found = re.search(r"The [a-z ]+ is (\d+)\. Remember it\.", text)
    return found[1] if found else ""


def _pair(text: str) -> str:
    key = re.findall(r'Key: "([\w-]+)"', text)[-1]
    found = re.search(rf'"{key}": "([\w-]+)"', text)
    return found[1] if found else ""


def _following(text: str) -> str:
    listed, _, given = text.rpartition("\nThe same list, continued from some point on:\n")
    return f" {listed.rpartition(chr(10))[2]} ".partition(f" {given} ")[2][:200]


def _copy(text: str) -> str:
    return text.rpartition("nothing else.\n")[2].strip()


def _label(text: str) -> str:
    labels = collections.defaultdict(set)
    for shot, label in re.findall(r"text: ([a-z ]+)\nlabel: (\d)", text):
        for word in shot.split():
            labels[word].add(label)
    asked = text.rpartition("text: ")[2].partition("\n")[0].split()
    told = [min(labels[word]) for word in asked if len(labels[word]) == 1]
    return told[0] if told else ""


def _counters(text: str) -> str:
    state = {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", text.partition("I will tell")[0])}
    for line in text.split("\n"):
        if found := re.fullmatch(r"User: Set (\w+) to (\d+)\.", line):
            state[found[1]] = int(found[2])
        elif found := re.fullmatch(r"User: Set (\w+) to what (\w+) is\.", line):
            state[found[1]] = state[found[2]]
        elif found := re.fullmatch(r"User: (Raise|Lower) (\w+) by (\d+)\.", line):
            state[found[2]] += int(found[3]) if found[1] == "Raise" else -int(found[3])
        elif found := re.fullmatch(r"User: Swap (\w+) and (\w+)\.", line):
            state[found[1]], state[found[2]] = state[found[2]], state[found[1]]
    return ", ".join(str(state.get(name)) for name in ("red", "green", "blue", "yellow"))


def _list(text: str) -> str:
    x: list[int] = []
    for line in text.split("\n"):
        numbers = [int(value) for value in re.findall(r"\d+", line)]
        if line.startswith("x["):
            x[numbers[0]] = numbers[1]
        elif found := re.fullmatch(r"x\.(append|insert|pop|remove|reverse|sort)\([\d, ]*\)", line):
            getattr(x, found[1])(*numbers)
    return ", ".join(map(str, x)) + "]"


def _lines_of_a_class(text: str) -> str:
    who, target = re.findall(r"How many lines of (all users|the user \w+) have a word of the class (\w+)\?", text)[-1]
    members = set(re.search(rf"^{target}: (.*)$", text, re.MULTILINE)[1].split(", "))
    lines = re.findall(r"Day \d+ \| (\w+) \| (.+)", text)
    return str(sum(word in members and (who == "all users" or who.endswith(user)) for user, word in lines))


def _numbers_of_a_word(text: str) -> str:
    question = text.rpartition("\nWhat ")[2]
    key = re.search(r"of ([\w-]+) in the text", question)[1]
    found = re.findall(rf"The number of {key} is (\d+)\.", text)
    for i, ordinal in enumerate(("first", "second", "third", "fourth")):
        if f"the {ordinal} number" in question:
            found = found[i : i + 1]
    return f"I think 1234567890. Answer: {', '.join(found)}"


MOVE = r"(\w+) (?:went|moved|journeyed|travelled) to the (\w+)\."
TAKE = r"(\w+) (?:got|took|picked up) the (\w+) there\."
PUT = r"(\w+) (?:dropped|put down|left) the (\w+)\."


def _story(text: str) -> str:
    context, _, question = text.rpartition("<context>")[2].partition("</context>")
    question = question.partition("\nAnswer:")[0]
    if found := re.search(r"Where is (John|Mary|Sandra|Daniel)\?", question):
        return [room for who, room in re.findall(MOVE, context) if who == found[1]][-1]
    if found := re.search(r"Where (?:is|was) the (\w+)(?: before the (\w+))?\?", question):
        been = _rooms_of(context)[found[1]]
        return been[-1] if found[2] is None else been[been.index(found[2]) - 1]
    if found := re.search(r"What is (north|south|east|west) of the (\w+)\?", question):
        return re.search(rf"The (\w+) is {found[1]} of the {found[2]}\.", context)[1]
    if found := re.search(r"What is the (\w+) (north|south|east|west) of\?", question):
        return re.search(rf"The {found[1]} is {found[2]} of the (\w+)\.", context)[1]
    gifts = re.findall(r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\.", context)
    if found := re.search(r"Who gave the (\w+) to (\w+)\?", question):
        return next(a for a, b, c in gifts if (b, c) == (found[1], found[2]))
    if found := re.search(r"What did (\w+) give to (\w+)\?", question):
        return next(b for a, b, c in gifts if (a, c) == (found[1], found[2]))
    found = re.search(r"Who did (\w+) give the (\w+) to\?", question)
    return next(c for a, b, c in gifts if (a, b) == (found[1], found[2]))


def _rooms_of(context: str) -> dict[str, list[str]]:
    at, held, been = {}, {}, {}
    for found in re.finditer(f"{MOVE}|{TAKE}|{PUT}", context):
        who, room, taker, taken, putter, put = found.groups()
        if room:
            at[who] = room
            for thing in (thing for thing, holder in held.items() if holder == who):
                been[thing].append(room)
        elif taken:
            held[taken] = taker
            been.setdefault(taken, [at[taker]])
        else:
            held.pop(put, None)
    return been


def _found_number(text: str) -> str:
    numbers = sorted(int(value) for value in re.search(r"\[([\d, ]+)\]", text)[1].split(","))
    what = re.search(r"What is the ([a-z ]+) number", text)[1]
    if what == "median":
        return str(numbers[(len(numbers) - 1) // 2])
    place = {"second": 1, "third": 2}.get(what.split()[0], 0)
    return str(numbers[place] if "small" in what else numbers[-1 - place])


def _sum(text: str) -> str:
    expression = text.split("\n")[1].split()
    values = [int(expression[0])]
    for sign, term in zip(expression[1::2], expression[2::2], strict=True):
        values.append(values[-1] + (int(term) if sign == "+" else -int(term)))
    return ", ".join(map(str, values[-20:]))


def _call(text: str) -> str:
    functions = {
        name: (inner, int(sign + number))
        for name, inner, sign, number in re.findall(r"def (func_\d+)\(x\):\n    return (?:(func_\d+)\()?x\)? ([+-]) (\d+)", text)
    }
    name, argument = re.search(r"What does (func_\d+)\((-?\d+)\) return", text).groups()
    value = int(argument)
    while name:
        name, added = functions[name]
        value += added
    return f"{value}."


def _walk(text: str) -> str:
    edges = re.findall(r"(\w{6}) -> (\w{6})", text)
    if found := re.search(r"have an edge to the node (\w{6})\. Write", text):
        return f"[{', '.join({a for a, b in edges if b == found[1]})}]"
    distance, start = re.search(r"exactly (\d) steps from the node (\w{6}),", text).groups()
    seen = front = {start}
    for _ in range(int(distance)):
        front = {b for a, b in edges if a in front} - seen
        seen = seen | front
    return f"Final Answer: [{', '.join(front)}]"


def _repeated_turn(text: str) -> str:
    code, ordinal, asked = re.search(
        r"Write (\w{10}) and, behind it, repeat word for word the (\w+) (\w+ about [\w-]+) that you", text
    ).groups()
    replies = re.findall(rf"User: Write a {asked}\.\nAssistant: ([^\n]*)\n", text)
    ordinals = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
    return f"{code} {replies[ordinals.index(ordinal)]}"


READERS = {
    "ruler_niah": _needles,
    "ruler_vt": _chain,
    "ruler_cwe": _common,
    "ruler_fwe": _frequent,
    "ruler_qa_1": _keeper,
    "ruler_qa_2": _river,
    "needle_in_prose": _chosen,
    "single_needle_in_prose": _chosen,
    "passkey": _passkey,
    "infinitebench_number": _passkey,
    "key_value": _pair,
    "json_kv": _pair,
    "induction": _following,
    "repeated_words": _copy,
    "many_shot": _label,
    "session_state": _counters,
    "latent_list": _list,
    "label_counts": _lines_of_a_class,
    "ruler2": _numbers_of_a_word,
    "babilong": _story,
    "infinitebench_find": _found_number,
    "infinitebench_sum": _sum,
    "infinitebench_code": _call,
    "graphwalks": _walk,
    "mrcr": _repeated_turn,
}


class Reader:
    """A backend that sees the last `share` of each prompt's characters."""

    scheme, fingerprint = "none", "reader"

    def __init__(self, name: str, share: float = 1.0) -> None:
        self.name, self.share, self.asked = name, share, 0

    def complete(self, items: list[Item], new_tokens: int) -> Iterator[dict[int, str]]:
        """Answers by program, three at a time."""
        for first in range(0, len(items), 3):
            numbers = range(first, min(first + 3, len(items)))
            self.asked += len(numbers)
            yield {i: answer for i, answer in zip(numbers, self.answers([items[i] for i in numbers]), strict=True)}

    def answers(self, items: list[Item]) -> list[str]:
        """All of them."""
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
