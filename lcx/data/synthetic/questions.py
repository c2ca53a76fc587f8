"""Rows of training questions in words: prose with facts in it, or lines to remember, then questions and answers.

A row is made of token runs, so its length is exact with every tokenizer: what facts, lines and questions leave is prose.

Legend: R rows, T predictions in a row (so T + 1 tokens).
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from lcx.core.configs import choice, not_negative, positive
from lcx.core.errors import UserError
from lcx.data.synthetic import gaps
from lcx.data.synthetic.skills import SKILLS, Exercise, Size
from lcx.data.tasks.base import Haystack
from lcx.data.tokenizers.tokenizers import Tokenizer

QUOTED, CONTINUED = 40, 32
"""Bytes, about, of a quotation and of its continuation."""

PASSAGE, GAP = 176, 24
"""Bytes, about, of a passage around a gap, and at most of each word in the gap."""

BLANK = " ____"
"""What stands for the gap."""

LINE = 48
"""Bytes, about, of a line."""

TRIES = 4
"""How often the smallest exercise is tried, as some draws are longer than others."""


@dataclasses.dataclass(frozen=True)
class QuestionsConfig:
    """Settings of training questions.

    `skills`: rows of `lcx.data.synthetic.skills.SKILLS`, one for each row at random (none named: all). `prompt_format`: `base`
    (text), `chat` (turns of the chat template, the questions after the first as further turns), `auto` (chat where there is a
    template). `facts` hidden in prose and `questions` asked in a row, each raised to `..._per_1024` times the row's length in
    units of 1,024 tokens if that is more; `hops` renamings in a chain. A cloze leaves out `gap_words` words, which lie at least the
    share `gap_distance` of the row in front of the questions. Loss weights: `answer_weight` on answers and their end, `fact_weight`
    on facts and lines, `question_weight` on what asks, `haystack_weight` on prose.
    """

    skills: tuple[str, ...] = ()
    prompt_format: Literal["auto", "base", "chat"] = "auto"
    facts: int = 6
    facts_per_1024: float = 0.5
    questions: int = 3
    questions_per_1024: float = 0.0
    hops: int = 2
    gap_words: int = 2
    gap_distance: float = 0.25
    answer_weight: float = 6.0
    fact_weight: float = 0.0
    question_weight: float = 0.0
    haystack_weight: float = 1.0

    def __post_init__(self) -> None:
        for skill in self.skills:
            choice("questions.skills", skill, SKILLS)
        choice("questions.prompt_format", self.prompt_format, ("auto", "base", "chat"))
        positive("questions", facts=self.facts, questions=self.questions, hops=self.hops, answer_weight=self.answer_weight)
        positive("questions", gap_words=self.gap_words)
        for name, value, default in (("gap_words", self.gap_words, 2), ("gap_distance", self.gap_distance, 0.25)):
            if value != default and self.skills and "cloze" not in self.skills:
                raise UserError(f"questions.{name}={value!r} has no effect without the skill 'cloze'; add it or leave this out")
        if not 0 <= self.gap_distance < 1:
            raise UserError(f"questions.gap_distance={self.gap_distance!r} must be a share of the row, from 0 to below 1")
        not_negative("questions", facts_per_1024=self.facts_per_1024, questions_per_1024=self.questions_per_1024)
        not_negative("questions", fact_weight=self.fact_weight, question_weight=self.question_weight)
        not_negative("questions", haystack_weight=self.haystack_weight)


class Run(NamedTuple):
    """Tokens int32 `[n]` that follow one another, and whether they are what the model should learn to write."""

    tokens: np.ndarray
    written: bool = False


Frame = Callable[[int], Sequence[Sequence[Run]]]
"""For a number of questions what stands around them: before all, then behind each question and behind each answer by turns."""


class Rows(NamedTuple):
    """`tokens` int32 `[R, T + 1]`, `loss_weights` float32 and `answers` boolean `[R, T + 1]` of the token that is predicted.

    `skills`: the skill of each row.
    """

    tokens: np.ndarray
    loss_weights: np.ndarray
    answers: np.ndarray
    skills: tuple[str, ...]


class QuestionTask:
    """The sampler of rows; without a `frame` questions are asked in plain text."""

    def __init__(self, config: QuestionsConfig, tokenizer: Tokenizer, frame: Frame | None = None) -> None:
        self.config, self._tokenizer = config, tokenizer
        self._skills = config.skills or tuple(SKILLS)
        # Between turns of a chat the words of both begin a line; in plain text an answer goes on behind a colon.
        plain = frame is None
        self._frame, self._space, self._ask = (plain_frame(tokenizer), " ", "\nQuestion: ") if plain else (frame, "", "\n\n")

    def uniforms(self, length: int) -> int:
        """How many uniform numbers in [0, 1) a row needs."""
        return 2

    def describe(self, length: int) -> str:
        """What a row of `length` predictions holds."""
        facts, questions = self.counts(length)
        return f"{facts} facts and {questions} questions ({', '.join(self._skills)})"

    def counts(self, length: int) -> tuple[int, int]:
        """(facts, questions) in a row of `length` predictions."""
        config, units = self.config, length / 1024
        facts = max(config.facts, round(config.facts_per_1024 * units))
        return facts, max(config.questions, round(config.questions_per_1024 * units))

    def rows(self, uniforms: np.ndarray, length: int, haystack: Haystack) -> Rows:
        """The rows determined by `uniforms` float64 `[R, 2]`; each depends only on its own numbers.

        Raises `UserError` if a row is too short for a question, or the haystack for a row.
        """
        total = length + 1
        if haystack.num_tokens < total:
            raise UserError(f"the haystack has {haystack.num_tokens} tokens, but a row needs {total}; use a larger corpus")
        tokens, kinds = np.zeros((len(uniforms), total), np.int32), np.zeros((len(uniforms), total), np.int8)
        starts = (uniforms[:, 1] * (haystack.num_tokens - total + 1)).astype(np.int64)
        skills = []
        for i, (row, prose) in enumerate(zip(uniforms, haystack.windows(starts, total), strict=True)):
            skill, runs = self._row(random.Random(int(row[0] * (1 << 53))), total, prose)
            tokens[i] = np.concatenate([run for run, _ in runs])
            kinds[i] = np.repeat([kind for _, kind in runs], [len(run) for run, _ in runs])
            skills.append(skill)
        config = self.config
        by_kind = np.array([config.haystack_weight, config.fact_weight, config.question_weight, config.answer_weight], np.float32)
        return Rows(tokens, by_kind[kinds], kinds == _ANSWER, tuple(skills))

    def check(self, length: int, haystack: Haystack) -> None:
        """Raises `UserError` if a skill finds no room in rows of `length` predictions."""
        rng, total = random.Random(0), length + 1
        for skill in self._skills:
            if not any(self._exercised(rng, skill, total, haystack.windows(np.zeros(1, int), total)[0]) for _ in range(TRIES)):
                raise UserError(f"a row of {length} tokens is too short for a question of {skill}; use longer rows or other skills")

    def _row(self, rng: random.Random, total: int, prose: np.ndarray) -> tuple[str, list[tuple[np.ndarray, int]]]:
        """A skill, and runs of tokens with their kinds, `total` tokens in all; another skill where the first finds no room."""
        for skill in rng.sample(self._skills, len(self._skills)):
            if runs := self._exercised(rng, skill, total, prose):
                return skill, runs
        raise UserError(f"a row of {total - 1} tokens is too short for a question of {', '.join(self._skills)}; use longer rows")

    def _exercised(self, rng: random.Random, skill: str, total: int, prose: np.ndarray) -> list[tuple[np.ndarray, int]] | None:
        """A row of a skill, with fewer facts and questions than asked for if need be; None if not even one question fits."""
        facts, questions = self.counts(total - 1)
        for _ in range(facts.bit_length() + questions.bit_length() + TRIES):
            # A generator of its own for every try, so that a smaller exercise does not depend on the larger ones.
            found = self._try(
                random.Random(rng.random()),
                skill,
                Size(facts, self.config.hops, round(total * self._bytes_per_token / LINE)),
                questions,
                total,
                prose,
            )
            if found is not None:
                return found
            facts, questions = max(1, facts // 2), max(1, questions // 2)
        return None

    def _try(
        self, rng: random.Random, skill: str, size: Size, questions: int, total: int, prose: np.ndarray
    ) -> list[tuple[np.ndarray, int]] | None:
        exercise = SKILLS[skill](rng, size)
        frame = self._frame(questions)
        # Where lines make the text, prose comes first.
        opening = self._encode(exercise.opening if exercise.line is None else f"\n\n{exercise.opening}")
        ask = self._encode(self._ask)
        fixed = len(opening) + len(ask) + sum(len(run.tokens) for runs in frame for run in runs)
        if exercise.line is not None:
            body = self._lines(exercise, total - fixed, questions)
            if body is None:
                return None
        else:
            body = [(self._encode(f" {fact} "), _FACT) for fact in exercise.facts]
        asked = [self._asked(pair, total) for _ in range(questions) if (pair := exercise.ask()) is not None]
        left = total - fixed - sum(len(run) for run, _ in body) - sum(question.size + len(answer) for question, answer in asked)
        if len(asked) < questions or left < 0:
            return None
        prose = prose[:left].copy()
        if exercise.line is None:
            body = self._hidden(rng, prose, body)
        else:
            body = [(prose, _HAYSTACK), (opening, _QUESTION), *body]
            opening = opening[:0]
        quoted = [self._quoted(rng, prose, total, question, answer) for question, answer in asked]
        if any(pair is None for pair in quoted):
            return None
        runs = [*_framed(frame[0]), (opening, _QUESTION), *body, (ask, _QUESTION)]
        for i, (question, answer) in enumerate(pair for pair in quoted if pair is not None):
            runs += [(question, _QUESTION), *_framed(frame[2 * i + 1]), (answer, _ANSWER), *_framed(frame[2 * i + 2])]
        return runs

    def _lines(self, exercise: Exercise, room: int, questions: int) -> list[tuple[np.ndarray, int]] | None:
        """As many lines as fit beside the questions; None if that is not even one for each."""
        assert exercise.line is not None
        lines, used = [], 0
        while True:
            line = self._encode(exercise.line() + "\n")
            # A question is about as long as two lines, and has words of its own; the next line has to fit as well.
            if used + 2 * len(line) + questions * (2 * len(line) + self._tokens_of(96)) > room:
                break
            lines.append((line, _FACT))
            used += len(line)
        # The last line is part of the exercise, though it was not to be part of the text.
        lines.append((line, _FACT))
        return lines if len(lines) > questions else None

    def _asked(self, pair: tuple[str, str], total: int) -> tuple[_Question, np.ndarray]:
        """A question with room for its quotation, and its answer, in tokens."""
        text, answer = pair
        before, mark, after = text.partition("{gap}")
        if mark:
            # A passage and a gap together have a fixed size; short rows have short passages.
            passage = self._tokens_of(min(PASSAGE, round(total * self._bytes_per_token / 6))) + len(self._encode(BLANK))
            filled = self._tokens_of(GAP * self.config.gap_words)
            return _Question(self._encode(before), passage, self._encode(after), True), np.zeros(filled, np.int32)
        before, mark, after = text.partition("{quote}")
        quoted = self._tokens_of(QUOTED) if mark else 0
        answered = np.zeros(self._tokens_of(CONTINUED), np.int32) if mark else self._encode(self._space + answer)
        return _Question(self._encode(before), quoted, self._encode(after)), answered

    def _quoted(
        self, rng: random.Random, prose: np.ndarray, total: int, question: _Question, answer: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Question and answer with a passage that stands in the prose once; None if there is none."""
        if not question.quoted:
            return np.concatenate([question.before, question.after]), answer
        if question.gap:
            return self._gapped(rng, prose, total, question, len(answer))
        size = question.quoted + len(answer)
        if len(prose) < 2 * size:
            return None
        # What is to be written begins with a word where the tokens allow it.
        places = np.flatnonzero(self._begins_word[prose[question.quoted : len(prose) - len(answer)]])
        for _ in range(8):
            at = int(rng.choice(places)) if len(places) else rng.randrange(len(prose) - size)
            quote, answer = prose[at : at + question.quoted], prose[at + question.quoted : at + size]
            windows = np.lib.stride_tricks.sliding_window_view(prose, question.quoted)
            if np.sum((windows == quote).all(axis=1)) == 1:
                return np.concatenate([question.before, quote, question.after]), answer
        return None

    def _gapped(
        self, rng: random.Random, prose: np.ndarray, total: int, question: _Question, most: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Question and answer of a cloze, as long together as was reserved."""
        blank = self._encode(BLANK)
        gap = gaps.find(
            rng,
            prose,
            self._begins_word,
            self._blank,
            self._tokenizer.decode,
            words=self.config.gap_words,
            room=question.quoted - len(blank) + most,
            most=most,
            before=len(prose) - round(self.config.gap_distance * total),
        )
        if gap is None:
            return None
        return np.concatenate([question.before, gap.left, blank, gap.right, question.after]), gap.answer

    def _hidden(self, rng: random.Random, prose: np.ndarray, facts: list[tuple[np.ndarray, int]]) -> list[tuple[np.ndarray, int]]:
        """The prose with the facts in it, at places drawn evenly, each behind the sentence that ends next."""
        ends = np.flatnonzero(self._ends_sentence[prose]) + 1
        places = []
        for place in sorted(rng.randrange(len(prose) + 1) for _ in facts):
            i = bisect.bisect_left(ends, place)
            places.append(int(ends[i]) if i < len(ends) else place)
        runs, at = [], 0
        for place, fact in zip(places, facts, strict=True):
            runs += [(prose[at:place], _HAYSTACK), fact]
            at = place
        return [*runs, (prose[at:], _HAYSTACK)]

    @functools.cached_property
    def _ends_sentence(self) -> np.ndarray:
        """Which tokens end a sentence or a line, boolean `[vocabulary]`."""
        return np.array([text.rstrip(" ").endswith((".", "!", "?", "\n")) for text in self._texts])

    @functools.cached_property
    def _begins_word(self) -> np.ndarray:
        """Which tokens begin with a space, boolean `[vocabulary]`."""
        return np.array([text.startswith((" ", "\n")) for text in self._texts])

    @functools.cached_property
    def _blank(self) -> np.ndarray:
        """Which tokens are white space alone, boolean `[vocabulary]`."""
        return np.array([text.isspace() for text in self._texts])

    @functools.cached_property
    def _texts(self) -> list[str]:
        """The text of every token behind another one, as some tokenizers drop the space before a first word."""
        (first, *_) = self._encode(".")
        start = len(self._tokenizer.decode(np.array([first], np.int32)))
        ids = range(self._tokenizer.vocab_size)
        return [self._tokenizer.decode(np.array([first, i], np.int32))[start:] for i in ids]

    @functools.cached_property
    def _bytes_per_token(self) -> float:
        text = "How much text is there in a token of this tokenizer, on average? "
        return len(text) / len(self._encode(text))

    def _tokens_of(self, size: int) -> int:
        return max(2, round(size / self._bytes_per_token))

    def _encode(self, text: str) -> np.ndarray:
        return self._tokenizer.encode(text) if text else np.zeros(0, np.int32)


_HAYSTACK, _FACT, _QUESTION, _ANSWER = range(4)


class _Question(NamedTuple):
    """The question's text around a passage of the prose of `quoted` tokens, in which a `gap` may be to fill."""

    before: np.ndarray
    quoted: int
    after: np.ndarray
    gap: bool = False

    @property
    def size(self) -> int:
        return len(self.before) + self.quoted + len(self.after)


def _framed(runs: Sequence[Run]) -> list[tuple[np.ndarray, int]]:
    return [(run.tokens, _ANSWER if run.written else _QUESTION) for run in runs]


def plain_frame(tokenizer: Tokenizer) -> Frame:
    """Questions and answers as text for a base model; a row begins with begin-of-sequence if the model was trained so."""
    bos = np.array([tokenizer.bos_id] if tokenizer.begins_with_bos else [], np.int32)
    ask, answer, end = (tokenizer.encode(text) for text in ("\nQuestion: ", "\nAnswer:", "\n"))

    def frame(questions: int) -> list[list[Run]]:
        runs: list[list[Run]] = [[Run(bos)]]
        for i in range(questions):
            runs += [[Run(answer)], [Run(end, True)] + ([Run(ask)] if i + 1 < questions else [])]
        return runs

    return frame
