"""How a document becomes requests to a model, and answers become a document: rewriting, and questions about far spans."""

from __future__ import annotations

import abc
import dataclasses
import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from lcx.data.curation.rows import row
from lcx.data.curation.synthesize import prompts
from lcx.data.curation.synthesize.generator import Answer
from lcx.data.curation.synthesize.passages import cut, far_apart
from lcx.data.curation.synthesize.settings import RephraseSettings, SpanSettings, SynthesizeConfig
from lcx.data.tokenizers import tokenizers

_NGRAM = 5
_WORD = re.compile(r"\w+")
_PREFACE = re.compile(r"(?:here|sure|certainly|of course)\b[^\n]{0,160}:[ \t]*\n+", re.IGNORECASE)
_LABELLED = re.compile(r"^\W*question\b\W*?:\W*?(?P<question>\S.*?)^\W*answer\b\W*?:(?P<answer>.*)", re.I | re.M | re.S)
_PASSAGES = re.compile(
    r"\bpassages?\s+\d|\b(?:these|both|all|two|three|first|second|third|last|given|above|following)\s+passages?\b"
    r"|\bthe passages\b|\baccording to the passage\b",
    re.IGNORECASE,
)


class Unusable(Exception):
    """Why an answer, or a document, is not used, in a word or two."""


@dataclasses.dataclass(frozen=True)
class Draft:
    """What a model is asked about a document: `requests`, and for each the places in the `text` that it shows, (start, end)."""

    source: str
    name: str
    text: str
    requests: tuple[str, ...]
    places: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def origin(self) -> dict[str, str]:
        """The document, as rows name it."""
        return {"source": self.source, "name": self.name}


class Method(abc.ABC):
    """From a document to requests, and from what came of their answers to a row."""

    @abc.abstractmethod
    def draft(self, source: str, name: str, text: str) -> Draft:
        """The requests; raises `Unusable` for a document that the method cannot use."""

    @abc.abstractmethod
    def read(self, draft: Draft, number: int, answer: Answer) -> Any:
        """What the answer to a request says; raises `Unusable` for one that cannot be used."""

    @abc.abstractmethod
    def write(self, draft: Draft, found: Sequence[Any], reasons: Sequence[str], name: str, source: str) -> tuple[bytes, int]:
        """A row, ending in a line break, from what was read (None where it was not, for the reason at its place), and its `bytes`.

        Raises `Unusable` for a document that is dropped.
        """

    def shown(self, draft: Draft, number: int, most: int) -> str:
        """The places that a request shows, at most so many characters of each."""
        return "\n[...]\n".join(draft.text[start:end][:most] for start, end in draft.places[number])


class Rephrase(Method):
    """A document written anew, passage by passage."""

    def __init__(self, settings: RephraseSettings) -> None:
        self._settings = settings

    def draft(self, source: str, name: str, text: str) -> Draft:
        """A request for each passage, without the white space around it."""
        places = tuple(_trimmed(text, cut(text, self._settings.passage_chars)))
        if not places:
            raise Unusable("blank")
        requests = (prompts.rephrase(text[start:end], self._settings.style, self._settings.prompt) for start, end in places)
        return Draft(source, name, text, tuple(requests), tuple((place,) for place in places))

    def read(self, draft: Draft, number: int, answer: Answer) -> str:
        """The passage rewritten."""
        ((start, end),) = draft.places[number]
        passage, found = draft.text[start:end], _PREFACE.sub("", answer.words, count=1).strip()
        if not found:
            raise Unusable("empty")
        if len(found) < self._settings.min_ratio * len(passage):
            raise Unusable("too_short")
        if len(found) > self._settings.max_ratio * len(passage):
            raise Unusable("too_long")
        if copied(found, passage) > self._settings.max_copied:
            raise Unusable("copy")
        return found

    def write(self, draft: Draft, found: Sequence[Any], reasons: Sequence[str], name: str, source: str) -> tuple[bytes, int]:
        """The text with each passage in its place, and where each stands and stood, in bytes of UTF-8."""
        if any(reasons) and self._settings.failed == "drop":
            raise Unusable("a_passage_failed")
        if all(one is None for one in found):
            raise Unusable("nothing_rewritten")
        pieces, passages, old, new, at = [], [], 0, 0, 0
        for one, reason, ((start, end),) in zip(found, reasons, draft.places, strict=True):
            between, passage = draft.text[at:start].encode(), draft.text[start:end].encode()
            written = passage if one is None else one.encode()
            old, new = old + len(between), new + len(between)
            place = {"start": new, "end": new + len(written), "from": old, "to": old + len(passage)}
            passages.append({**place, "kept": reason} if reason else place)
            pieces += [between, written]
            old, new, at = old + len(passage), new + len(written), end
        text = b"".join([*pieces, draft.text[at:].encode()])
        return row(source, name, text, document=draft.origin, passages=passages), len(text)


class Spans(Method):
    """A conversation about a document whose questions need several spans of it that are far apart."""

    def __init__(self, settings: SpanSettings, seed: int) -> None:
        self._settings, self._seed = settings, seed
        self._counted: dict[tuple[str, str], tuple[list[float], list[float]]] = {}

    def draft(self, source: str, name: str, text: str) -> Draft:
        """A request for each question, of spans that no other one has in this combination."""
        settings = self._settings
        places = list(_trimmed(text, cut(text, settings.span_chars)))
        if (measured := self._counted.get((source, name))) is None:
            measured = self._counted[source, name] = self._measured(text, places)
        starts, ends = measured
        rng = random.Random(f"{self._seed}\0{source}\0{name}")
        chosen: dict[tuple[int, ...], None] = {}
        for _ in range(2 * settings.per_document):
            numbers = far_apart(rng, starts, ends, settings.spans, settings.min_distance)
            if numbers is None:
                raise Unusable("too_short")
            if len(chosen) < settings.per_document:
                chosen[tuple(numbers)] = None
        shown = tuple(tuple(places[i] for i in numbers) for numbers in chosen)
        requests = (prompts.question([text[start:end] for start, end in spans], settings.prompt) for spans in shown)
        return Draft(source, name, text, tuple(requests), shown)

    def _measured(self, text: str, places: Sequence[tuple[int, int]]) -> tuple[list[float], list[float]]:
        """Where passages start and end, in the unit of the distance; tokens are counted passage by passage."""
        if self._settings.tokenizer is None:
            share = 1 / max(len(text), 1)
            return [start * share for start, _ in places], [end * share for _, end in places]
        encode, at, done = tokenizers.load(self._settings.tokenizer).encode, 0, 0
        starts, ends = [], []
        for start, end in places:
            done += len(encode(text[at:start]))
            starts.append(float(done))
            done += len(encode(text[start:end]))
            ends.append(float(done))
            at = end
        return starts, ends

    def read(self, draft: Draft, number: int, answer: Answer) -> dict[str, str]:
        """Question and answer."""
        found = parse(answer.words)
        if found is None:
            raise Unusable("unparsed")
        question, said = found
        if not question:
            raise Unusable("no_question")
        if not said:
            raise Unusable("no_answer")
        if f" {_words(said)} " in f" {_words(question)} ":
            raise Unusable("quotes_its_answer")
        if _PASSAGES.search(question):
            raise Unusable("speaks_of_passages")
        return {"question": question, "answer": said}

    def write(self, draft: Draft, found: Sequence[Any], reasons: Sequence[str], name: str, source: str) -> tuple[bytes, int]:
        """The conversation, with the spans of each question in bytes of UTF-8 of the document."""
        turns: list[tuple[dict[str, str], Any]] = []
        for one, places in zip(found, draft.places, strict=True):
            if one is not None and all(_words(one["question"]) != _words(other["question"]) for other, _ in turns):
                turns.append((one, places))
        if not turns:
            raise Unusable("no_question_left")
        drawn = random.Random(f"order\0{self._seed}\0{draft.source}\0{draft.name}").random()
        is_first = drawn < self._settings.question_first
        messages = []
        for i, (one, _) in enumerate(turns):
            opening = (one["question"], draft.text) if is_first else (draft.text, one["question"])
            messages.append({"role": "user", "content": "\n\n".join(opening) if i == 0 else one["question"]})
            messages.append({"role": "assistant", "content": one["answer"]})
        spans = [[_in_bytes(draft.text, place) for place in places] for _, places in turns]
        size = len(draft.text.encode())
        head = {"name": name, "source": source, "bytes": size, "document": draft.origin}
        order = "question_first" if is_first else "document_first"
        line = json.dumps({**head, "order": order, "spans": spans, "messages": messages}, ensure_ascii=False)
        return (line + "\n").encode("utf-8", "replace"), size


def build(config: SynthesizeConfig) -> Method:
    """The method that a source is made by; one that asks no model has none."""
    return Rephrase(config.rephrase) if config.method == "rephrase" else Spans(config.questions, config.seed)


def parse(text: str) -> tuple[str, str] | None:
    """Question and answer of a model's words: JSON with both, wherever it stands in them, or lines that begin with their names.

    None if there is neither; the two are without the white space around them.
    """
    for found in _objects(text):
        values = {str(key).casefold(): value for key, value in found.items()}
        if isinstance(values.get("question"), str) and isinstance(values.get("answer"), str | int | float):
            return values["question"].strip(), str(values["answer"]).strip()
    if (match := _LABELLED.search(text)) is not None:
        return match["question"].strip(" \n*_"), match["answer"].strip(" \n*_")
    return None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    decoder = json.JSONDecoder(strict=False)
    for match in re.finditer(r"\{", text):
        try:
            found, _ = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        yield found


def copied(text: str, other: str) -> float:
    """The share of a text's sequences of five words that another text has; of shorter ones, whether all of it is there."""
    words, theirs = (_WORD.findall(one.casefold()) for one in (text, other))
    size = min(_NGRAM, len(words))
    if not size:
        return float(text == other)
    own, known = ([tuple(some[i : i + size]) for i in range(len(some) - size + 1)] for some in (words, theirs))
    known = set(known)
    return sum(one in known for one in own) / len(own)


def _words(text: str) -> str:
    return " ".join(_WORD.findall(text.casefold())) or text.strip()


def _trimmed(text: str, places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The places without the white space around what they hold; those that hold nothing else are left out."""
    for start, end in places:
        piece = text[start:end]
        begin = start + len(piece) - len(piece.lstrip())
        if begin < end:
            yield begin, start + len(piece.rstrip())


def _in_bytes(text: str, place: tuple[int, int]) -> list[int]:
    start = len(text[: place[0]].encode())
    return [start, start + len(text[place[0] : place[1]].encode())]
