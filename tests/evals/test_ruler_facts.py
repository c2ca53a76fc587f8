"""RULER v1's facts, one by one: its table of tasks, how each is made and scored, and its quirks, some of which `faithful` keeps."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import random
import re
import socket
import sys
import urllib.request
import uuid

import numpy as np
import pytest
import wonderwords

from lcx.core.errors import UserError
from lcx.data.config import DataConfig
from lcx.data.tokenizers import tokenizers
from lcx.evals.answers import AnswerLog
from lcx.evals.base import Item, Materials
from lcx.evals.config import EvalConfig, QuestionConfig
from lcx.evals.results import EvalResult, Measurement
from lcx.evals.tasks import ruler_niah, ruler_qa
from lcx.evals.tasks.ruler_counting import LARGE, SMALL, occurrences
from lcx.evals.tasks.ruler_tracing import example_units
from lcx.evals.tasks.table import TASKS
from lcx.evals.text import noise, words
from lcx.evals.text.fit import largest
from lcx.evals.text.prose import Prose, standard_library
from lcx.evals.text.questions import Draw, average
from tests.evals.text_cases import NEEDLES, RULER, Reader, bpe, squad, task

NEEDLE = r"One of the special magic (numbers|uuids) for ([\w-]+) is: ([\w-]+)\."
UNITS = {"niah": 200, "vt": 100, "cwe": 60, "fwe": 600, "qa": 20}
"""Enough of everything for a prompt of a few thousand characters."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the question files of all tests lie."""
    return tmp_path_factory.mktemp("ruler")


@pytest.fixture(scope="module")
def subwords(tmp_path_factory):
    """A byte-level BPE."""
    return bpe(tmp_path_factory.mktemp("bpe"))


def composed(made, number=0, units=None, length=8192):
    """A sample that is not fitted to anything."""
    kind = made.name.removeprefix("ruler_").partition("_")[0]
    return made.compose(Draw(random.Random(f"facts {number}"), length, number), UNITS[kind] if units is None else units)


def needles(text):
    """(key, value) of every needle, in the order of the text."""
    return [(key, value) for _, key, value in re.findall(NEEDLE, text)]


def listed(text):
    """The words of the last numbered list before the last question."""
    return re.findall(r"\d+\. ([a-z]+)", text[: text.rindex("\nQuestion:")].rpartition("occur most often.\n")[2])


def coded(text):
    """The words of the coded text."""
    return text.partition("give no explanation.\n")[2].rpartition("\nQuestion:")[0].split(" ")


def documents(text):
    """The documents of a prompt, without their headings."""
    text = text.partition("These are the given documents.\n\n")[2].rpartition("\n\nAnswer the question")[0]
    return re.split(r"(?:^|\n\n)Document \d+:\n", text)[1:]


def assignments(text):
    """(variable, what it is assigned) in the order of the text."""
    return re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", text)


def chains(text):
    """The assignments of the example, and those that are asked about."""
    example, _, asked = text.partition("\n\nFollow the chain")
    return assignments(example), assignments(asked)


class Lowest(random.Random):
    """Draws the smallest integer that it may."""

    def randrange(self, start, stop):
        return start


class Highest(random.Random):
    """Draws the largest integer that it may."""

    def randrange(self, start, stop):
        return stop - 1


# --- The table: tokens to generate, what the prompt announces and asks, what the prefix says. ---


def one_needle(what, key):
    prompt = (
        rf"A special magic {what} is hidden in the text below\. Keep it in mind: you will be asked for it afterwards\.\n(?s:.+)\n"
        rf"What is the special magic {what} for {key} that the text above mentions\?"
    )
    return 128, prompt, rf" The special magic {what} for {key} that the text above mentions is"


def four_needles(keys):
    prompt = (
        r"Some special magic numbers are hidden in the text below\. Keep them in mind: you will be asked for them afterwards\.\n"
        rf"(?s:.+)\nWhat are all the special magic numbers for {keys} that the text above mentions\?"
    )
    return 128, prompt, rf" The special magic numbers for {keys} that the text above mentions are"


WORD, IDENTIFIER = r"[a-z]+-[a-z]+", r"[\da-f]{8}(?:-[\da-f]{4}){3}-[\da-f]{12}"
TABLE = {
    "ruler_niah_single_1": one_needle("number", WORD),
    "ruler_niah_single_2": one_needle("number", WORD),
    "ruler_niah_single_3": one_needle("uuid", WORD),
    "ruler_niah_multikey_1": one_needle("number", WORD),
    "ruler_niah_multikey_2": one_needle("number", WORD),
    "ruler_niah_multikey_3": one_needle("uuid", IDENTIFIER),
    "ruler_niah_multivalue": four_needles(WORD),
    "ruler_niah_multiquery": four_needles(f"{WORD}, {WORD}, {WORD}, and {WORD}"),
    "ruler_vt": (
        30,
        r"(?s:.+)\n\nFollow the chain of variable assignments that is hidden in the text below, and memorise it\.\n\n(?s:.+)\n"
        r"Question: Find all variables that are assigned the value \d{5}, directly or through other variables, in the text above\.",
        r" Answer: By the chain of assignments in the text above, 5 variables are assigned the value \d{5}, they are:",
    ),
    "ruler_cwe": (
        120,
        r"(?s:.+)\nBelow is a numbered list of words, some of which occur more often than the others\. Memorise those that occur "
        r"most often\.\n(?:\d+\. [a-z]+ ?)+\nQuestion: What are the 10 most common words in the above list\?",
        r" Answer: The top 10 words that occur most often in the list are:",
    ),
    "ruler_fwe": (
        50,
        r"Read the coded text below and keep track of how often each coded word occurs\. Find the three coded words that occur "
        r"most often\. Ignore the dots '\.\.\.\.' and give no explanation\.\n(?:(?:[a-z]{6}|\.\.\.) ?)+\n"
        r"Question: What are the three most frequently appearing words in the coded text above\?",
        r" Answer: According to the coded text above, the three most frequently appearing words are:",
    ),
    **dict.fromkeys(
        ("ruler_qa_1", "ruler_qa_2"),
        (
            32,
            r"(Answer the question from the given documents\. Give only the answer and nothing else\.)\n\nThese are the given "
            r"documents\.\n\nDocument 1:\n(?s:.+)\n\n\1\n\nQuestion: (?:Who|Which) [^\n]+\?",
            r" Answer:",
        ),
    ),
}


def test_the_table_has_thirteen_rows():
    assert set(TABLE) == set(RULER) and len(RULER) == 13


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("name", TABLE)
def test_row_of_the_table(name, faithful, folder, subwords):
    tokens, prompt, prefix = TABLE[name]
    made = task(name, folder, subwords, faithful=faithful)
    given, needed = made.new_tokens(16384), len(made.format.tokenizer.encode(made.answer(composed(made))))
    # Only where an answer takes most of them are there more than RULER's, and none under `faithful`.
    assert given == tokens or not faithful and given > tokens and needed > tokens // 2
    for number in range(4):
        sample = composed(made, number)
        assert re.fullmatch(prompt, sample.prompt) and re.fullmatch(prefix, sample.prefix)


@pytest.mark.parametrize("name", RULER)
def test_a_byte_tokenizer_gets_tokens_for_a_whole_answer_but_not_under_faithful(name, folder):
    made, kept = task(name, folder), task(name, folder, faithful=True)
    assert kept.new_tokens(32768) == TABLE[name][0]
    assert all(len(item.answer) < made.new_tokens(32768) for item in made.items(32768, 1))


@pytest.mark.parametrize("name", NEEDLES)
def test_the_prefix_repeats_the_keys_that_are_asked_for(name, folder):
    sample = composed(task(name, folder))
    asked = re.search(r" for (.+) that the text above mentions\?$", sample.prompt)[1]
    assert f" for {asked} that" in sample.prefix
    given = collections.defaultdict(list)
    for key, value in needles(sample.prompt):
        given[key].append(value)
    assert {value for key in re.split(r", and |, ", asked) for value in given[key]} == set(sample.references)


@pytest.mark.parametrize(("hops", "count"), [(1, 2), (4, 5), (6, 7)])
def test_the_prefix_of_vt_tells_how_many_variables_there_are(hops, count, folder):
    sample = composed(dataclasses.replace(task("ruler_vt", folder), hops=hops))
    assert len(sample.references) == count and f" {count} variables are assigned the value " in sample.prefix


# --- How a run is scored. ---


def item_of(references):
    return Item(np.zeros(1, np.int32), np.zeros(0, np.int32), references=references)


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("name", [name for name in RULER if "qa" not in name])
def test_all_is_the_share_of_references_in_the_output(name, faithful, folder):
    made = task(name, folder, faithful=faithful)
    for references, output, score in [
        (("ABCDE", "FGHIJ", "KLMNO", "PQRST"), "abcde klmno", 0.5),
        (("ABCDE", "FGHIJ", "KLMNO", "PQRST"), "PQRST, KLMNO, FGHIJ and ABCDE.", 1),
        (("ABCDE", "FGHIJ", "KLMNO", "PQRST"), "A B C D E", 0),
        (("ABCDE", "FGHIJ", "KLMNO", "PQRST"), "xABCDEx", 0.25),
        (("ABCDE", "FGHIJ", "KLMNO", "PQRST"), "", 0),
        (("1234567",), "It is 1234567, I think.", 1),
        (("1234567",), "123 4567", 0),
        # A break within a reference is one, whatever character it was.
        (("1234567",), "123\t4567", 0),
    ]:
        assert made.score(item_of(references), output) == score, (references, output)


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("name", ["ruler_qa_1", "ruler_qa_2"])
def test_part_is_one_if_any_reference_is_in_the_output(name, faithful, folder):
    made = task(name, folder, faithful=faithful)
    for references, output, score in [
        (("Paris", "the city of Paris"), "It is PARIS.", 1),
        (("Paris", "Lutetia"), "lutetia, of old", 1),
        (("Paris", "Lutetia"), "Paris or Lutetia", 1),
        (("Paris", "Lutetia"), "Par is", 0),
        (("Paris", "Lutetia"), "", 0),
        (("Paris",), "Parisian", 1),
        (("no",), "I do not know", 1),
    ]:
        assert made.score(item_of(references), output) == score, (references, output)


@pytest.mark.parametrize("name", ["ruler_niah_single_1", "ruler_qa_1"])
@pytest.mark.parametrize("code", range(32))
def test_control_characters_are_line_breaks(code, name, folder):
    made = task(name, folder)
    # A line break is what an answer that spans lines is compared with.
    assert made.score(item_of(("a\nb",)), f" {chr(code)}x a{chr(code)}b{chr(code)} ") == 1
    assert made.score(item_of(("a b",)), f"a{chr(code)}b") == made.score(item_of(("ab",)), f"a{chr(code)}b") == 0


@pytest.mark.parametrize("character", [" ", "\x7f", "\x85", "\xa0", "é"])
def test_other_characters_stay(character, folder):
    made = task("ruler_niah_single_1", folder)
    assert made.score(item_of((f"a{character}b",)), f"a{character}b") == 1
    assert made.score(item_of(("a\nb",)), f"a{character}b") == 0


def test_empty_answers_are_counted_and_score_nothing(folder):
    made, answers = task("ruler_niah_single_1", folder), itertools.cycle(["", " \n", "\x00\x1f\x00", "an answer", None])

    class Sparing(Reader):
        def answers(self, items):
            return [item.references[0] if (said := next(answers)) is None else said for item in items]

    rows = {row.metric: row for row in made.measure(Sparing(made.name), 2048, 10, AnswerLog(None))}
    assert (rows["empty"].value, rows["empty"].n) == (0.6, 10)
    # They are not left out of the mean.
    assert (rows["score"].value, rows["score"].n) == (0.2, 10) and rows["score"].scores == (0, 0, 0, 0, 1) * 2


def test_a_length_scores_the_plain_mean_of_thirteen_tasks():
    rows = [Measurement(name, "score", 4096, i / 12, n=1 + 7 * i) for i, name in enumerate(RULER)]
    (found,) = average(rows, "ruler", RULER)
    assert (found.value, found.n, found.metric) == (pytest.approx(0.5), 13, "average")


def test_the_effective_length_is_the_longest_that_exceeds_85_6():
    def reached(*values):
        rows = tuple(Measurement("ruler", "average", 4096 << i, value, 13) for i, value in enumerate(values))
        return EvalResult("model", 4096, rows=rows).effective_length(EvalConfig().effective_threshold)

    assert reached(0.9, 0.857, 0.85) == 8192 and reached(0.9, 0.856, 0.85) == 4096 and reached(0.856) == 0


def test_the_length_counts_the_prefix_and_the_answer_and_begin_of_sequence_only_by_default(folder):
    for faithful, more in ((False, 1), (True, 0)):
        made = task("ruler_niah_single_1", folder, "bytes+bos", faithful=faithful)
        for item in made.items(8192, 2):
            written = len(item.text.encode())
            assert item.text.endswith(item.prefix) and len(item.prompt) == written + 1
            assert made.counted(len(item.prompt)) == written + more and written + more + made.new_tokens(8192) <= 8192
    # A length that holds the shortest prompt exactly under `faithful` is one token too short by default, where sizes are the same.
    kept = task("ruler_vt", folder, "bytes+bos", faithful=True)
    made = task("ruler_vt", folder, "bytes+bos")

    def shortest(of):
        lengths = iter(range(1000, 4000))
        while True:
            length = next(lengths)
            try:
                of.check(length)
            except UserError:
                continue
            return length - of.new_tokens(length)

    assert shortest(made) == shortest(kept) + 1


# --- Needles. ---


@pytest.mark.parametrize("name", NEEDLES)
def test_a_needle_is_one_sentence(name, folder):
    kind = "uuids" if name in ("ruler_niah_single_3", "ruler_niah_multikey_3") else "numbers"
    prompt = composed(task(name, folder)).prompt
    assert prompt.count("One of the special magic") == len(re.findall(NEEDLE, prompt)) > 0
    assert {found[0] for found in re.findall(NEEDLE, prompt)} == {kind}


def test_a_number_is_a_uniform_integer_of_seven_digits():
    assert (words.number(Lowest()), words.number(Highest())) == ("1000000", "9999999")
    rng = random.Random(0)
    drawn = [int(words.number(rng)) for _ in range(4000)]
    tenths = collections.Counter((value - 10**6) * 10 // (9 * 10**6) for value in drawn)
    # Five standard deviations of a binomial.
    assert sorted(tenths) == list(range(10)) and all(abs(count - 400) < 95 for count in tenths.values())


def test_a_uuid_has_the_form_of_version_4_and_random_bits():
    rng = random.Random(0)
    drawn = [uuid.UUID(words.identifier(rng)) for _ in range(400)]
    assert {(value.version, value.variant) for value in drawn} == {(4, uuid.RFC_4122)}
    ones = [sum(value.int >> bit & 1 for value in drawn) for bit in range(128)]
    fixed = {bit for bit, count in enumerate(ones) if count in (0, 400)}
    assert len(fixed) == 6 and all(120 < count < 280 for bit, count in enumerate(ones) if bit not in fixed)
    assert str(drawn[0]) == words.identifier(random.Random(0))


def test_a_key_is_an_adjective_and_a_noun_of_wonderwords(folder):
    lists = {kind: wonderwords.RandomWord.read_words(f"{kind}list.txt") for kind in ("adjective", "noun", "verb")}
    assert {kind: len(found) for kind, found in lists.items()} == {"adjective": 912, "noun": 6782, "verb": 1042}
    keys = [key for key, _ in needles(composed(task("ruler_niah_multikey_2", folder), units=1000).prompt)]
    assert len(keys) == 1001
    assert all(key.split("-")[0] in lists["adjective"] and key.split("-")[1] in lists["noun"] for key in keys)
    assert len({key.split("-")[0] for key in keys}) > 400 and len({key.split("-")[1] for key in keys}) > 800


@pytest.mark.parametrize(
    ("name", "keys", "values", "queries"),
    [
        ("single_1", 1, 1, 1),
        ("single_2", 1, 1, 1),
        ("single_3", 1, 1, 1),
        ("multikey_1", 4, 1, 1),
        ("multikey_2", 1, 1, 1),
        ("multikey_3", 1, 1, 1),
        ("multivalue", 1, 4, 1),
        # The table of RULER says one key and four queries: as many keys as queries.
        ("multiquery", 4, 1, 4),
    ],
)
def test_keys_values_and_queries(name, keys, values, queries, folder):
    sample = composed(task(f"ruler_niah_{name}", folder), units=200)
    found = needles(sample.prompt)
    others = 200 if name in ("multikey_2", "multikey_3") else 0
    assert len(found) == keys * values + others and len({key for key, _ in found}) == keys + others
    assert len({value for _, value in found}) == len(found) and len(sample.references) == queries * values
    asked = {key for key, value in found if value in sample.references}
    assert len(asked) == queries and all(key in sample.prefix for key in asked)


@pytest.mark.parametrize(("keys", "queries", "needed"), [(1, 4, 4), (4, 1, 4), (2, 3, 3), (3, 2, 3), (1, 1, 1)])
def test_there_are_as_many_keys_as_queries_or_more(keys, queries, needed, folder):
    made = dataclasses.replace(task("ruler_niah_single_2", folder), keys=keys, queries=queries)
    sample = composed(made)
    assert len(needles(sample.prompt)) == needed and len(sample.references) == queries


@pytest.mark.parametrize("faithful", [False, True])
def test_the_queried_keys_are_a_random_choice(faithful, folder):
    # `faithful` always has the needles in one order, so that the choice alone decides which of them is asked for.
    made = task("ruler_niah_multikey_1", folder, faithful=faithful)
    places = collections.Counter()
    for number in range(120):
        sample = composed(made, number)
        places[[value for _, value in needles(sample.prompt)].index(sample.references[0])] += 1
    assert sorted(places) == [0, 1, 2, 3] and min(places.values()) > 10


def test_several_keys_are_listed_with_commas_and_and(folder):
    made = task("ruler_niah_multiquery", folder)
    for queries, form in ((1, "{}"), (2, "{}, and {}"), (4, "{}, {}, {}, and {}")):
        sample = composed(dataclasses.replace(made, queries=queries))
        key_of = {value: key for key, value in needles(sample.prompt)}
        query = form.format(*(key_of[value] for value in sample.references))
        assert f" for {query} that the text above mentions" in sample.prompt
        assert f" for {query} that the text above mentions" in sample.prefix


# --- Haystacks. ---

PERCENTAGES = [
    *(0, 3, 5, 8, 10, 13, 15, 18, 21, 23, 26, 28, 31, 33, 36, 38, 41, 44, 46, 49),
    *(51, 54, 56, 59, 62, 64, 67, 69, 72, 74, 77, 79, 82, 85, 87, 90, 92, 95, 97, 100),
]


def test_the_forty_depths():
    assert list(ruler_niah.DEPTHS) == PERCENTAGES and len(PERCENTAGES) == 40


def own_prose(made, sentences):
    """The task with numbered sentences of two words as its prose."""
    return dataclasses.replace(made, prose=Prose([f"Sentence s{i}." for i in range(sentences)], "a test"))


def where(sample):
    """Before which of the sentences of an essay each needle stands."""
    text = sample.prompt.partition("\n")[2].rpartition("\nWhat ")[0]
    return [text[: found.start()].count("Sentence s") for found in re.finditer(NEEDLE, text)]


@pytest.mark.parametrize("sentences", [7, 40, 1000])
def test_a_needle_stands_before_the_sentence_of_one_of_the_forty_depths(sentences, folder):
    made = own_prose(task("ruler_niah_single_2", folder), sentences)
    samples = [composed(made, number, units=2 * sentences) for number in range(400)]
    assert {place for sample in samples for place in where(sample)} == {sentences * depth // 100 for depth in PERCENTAGES}
    assert all(where(sample) == [round(sample.depth * sentences)] for sample in samples)


@pytest.mark.parametrize("name", ["ruler_niah_multikey_1", "ruler_niah_multivalue", "ruler_niah_multiquery"])
def test_several_needles_stand_at_different_depths(name, folder):
    made = own_prose(task(name, folder), 1000)
    drawn = {tuple(where(composed(made, number, units=2000))) for number in range(150)}
    # Four out of the forty with replacement would be different with probability 0.86 only.
    assert all(len(set(places)) == 4 and list(places) == sorted(places) for places in drawn) and len(drawn) > 140
    assert {place for places in drawn for place in places} == {10 * depth for depth in PERCENTAGES}


def test_an_essay_is_counted_in_words_joined_by_spaces_and_repeated(folder):
    made = own_prose(task("ruler_niah_single_2", folder, faithful=True), 10)
    context = composed(made, units=47).prompt.split("\n")[1]
    hay = re.sub(NEEDLE + " ?", "", context).split()
    assert hay == [word for i in range(24) for word in ("Sentence", f"s{i % 10}.")][:47]


def test_a_line_of_noise_holds_the_five_sentences(folder):
    prompt = composed(task("ruler_niah_single_1", folder), units=50).prompt
    lines = [line for line in prompt.split("\n")[1:-1] if not re.fullmatch(NEEDLE, line)]
    assert lines == ["The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."] * 10


@pytest.mark.parametrize(("name", "units"), [("ruler_niah_single_1", 500), ("ruler_niah_multikey_2", 100)])
def test_a_needle_stands_before_any_of_the_lines(name, units, folder):
    made, places = task(name, folder), collections.Counter()
    for number in range(600):
        sample = composed(made, number, units=units)
        lines = sample.prompt.split("\n")[1:-1]
        assert len(lines) == 101
        places[next(i for i, line in enumerate(lines) if sample.references[0] in line)] += 1
    # Not the forty depths: nearly all places, of which 98 is none of them; a needle never comes last.
    assert len(places) > 90 and max(places) <= 99 and {1, 2, 4, 98, 99} & set(places)


@pytest.mark.parametrize("name", ["ruler_niah_multikey_2", "ruler_niah_multikey_3"])
def test_a_haystack_of_needles_is_made_of_random_needle_lines(name, folder):
    made = task(name, folder)
    first, second = (composed(made, number, units=100).prompt.split("\n")[1:-1] for number in (0, 1))
    assert all(re.fullmatch(NEEDLE, line) for line in first) and len({*first, *second}) == 202


# --- Variable tracking. ---


def test_vt_is_one_chain_of_five_variables_of_five_capitals(folder):
    made = task("ruler_vt", folder)
    for number in range(20):
        sample = composed(made, number)
        _, chain = chains(sample.prompt)
        names = [name for name, _ in chain]
        assert len(names) == len(set(names)) == 5 and all(re.fullmatch("[A-Z]{5}", name) for name in names)
        assert re.fullmatch(r"\d{5}", chain[0][1]) and [right for _, right in chain[1:]] == names[:-1]
        assert sample.references == tuple(names)
        asked = sample.prompt.rpartition("\n\nFollow the chain")[2]
        assert f"VAR {names[0]} = {chain[0][1]}\n" in asked and f"VAR {names[4]} = VAR {names[3]}\n" in asked
        assert f"assigned the value {chain[0][1]}," in asked and f"the value {chain[0][1]}, they" in sample.prefix


@pytest.mark.parametrize("lowest", [True, False])
def test_the_first_value_of_vt_is_10000_to_99998(lowest, folder, monkeypatch):
    drawn = iter(range(2))

    class Edges(random.Random):
        """The edge of a range, and the next value inside it for the draw after that."""

        def randrange(self, start, stop):
            return start + 1 - next(drawn) if lowest else stop - 2 + next(drawn)

    sample = task("ruler_vt", folder).compose(Draw(Edges(0), 8192, 0), 50)
    assert chains(sample.prompt)[1][0][1] == ("10000" if lowest else "99998")


def test_vt_places_lines_in_order_at_random_places(folder):
    made, places = task("ruler_vt", folder), set()
    for number in range(150):
        lines = composed(made, number, units=200).prompt.rpartition("memorise it.\n\n")[2].split("\n")[:-1]
        at = [i for i, line in enumerate(lines) if line.startswith("VAR ")]
        assert len(lines) == 45 and [line for i, line in enumerate(lines) if i not in at] == [noise.TEXT] * 40
        places.update(at)
    assert len(places) > 40


def test_vt_begins_with_one_solved_example_of_its_own(folder, subwords):
    made = task("ruler_vt", folder, subwords)
    examples = set()
    for number in range(10):
        sample = composed(made, number)
        example = sample.prompt.partition("\n\nFollow the chain")[0]
        solved, chain = chains(sample.prompt)
        names = [name for name, _ in solved]
        assert sample.prompt.count("Question:") == 2 and len(names) == len(set(names)) == 5
        assert all(re.fullmatch("[A-Z]{3}", name) for name in names) and re.fullmatch(r"\d{5}", solved[0][1])
        assert [right for _, right in solved[1:]] == names[:-1] and solved[0][1] != chain[0][1]
        assert example.endswith(f" 5 variables are assigned the value {solved[0][1]}, they are: {' '.join(names)}")
        assert 400 < len(made.format.tokenizer.encode(example)) <= 520
        examples.add((*names, solved[0][1]))
    # Its names and its value are those of the sample.
    assert len(examples) == len({found[-1] for found in examples}) == 10


def test_the_example_of_vt_has_a_budget_of_500_tokens(folder, subwords):
    made = task("ruler_vt", folder, subwords)

    def size(units):
        sample = made.chain(random.Random(0), units, letters=3, value="12345")
        return len(made.format.tokenizer.encode(sample.prompt + sample.prefix + made.answer(sample)))

    units = example_units(made, 131072)
    assert units == example_units(made, 4096) > example_units(made, 2048)
    assert 0.97 * 500 <= size(units) <= 500 < size(units + 5)


# --- Common words. ---


@pytest.mark.parametrize(
    ("length", "often", "seldom", "example_words", "example_often", "example_seldom"),
    [(2048, 6, 1, 20, 3, 1), (4095, 6, 1, 20, 3, 1), (4096, 30, 3, 40, 10, 3), (131072, 30, 3, 40, 10, 3)],
)
def test_how_often_words_of_cwe_occur(length, often, seldom, example_words, example_often, example_seldom, folder, subwords):
    made = task("ruler_cwe", folder, subwords, faithful=True)
    sample = composed(made, length=length, units=70)
    example, _, asked = sample.prompt.rpartition("\nBelow is a numbered list")
    counts = collections.Counter(listed(asked))
    assert collections.Counter(counts.values()) == {often: 10, seldom: 60}
    assert {word for word, count in counts.items() if count == often} == set(sample.references)
    solved = collections.Counter(listed(example))
    assert collections.Counter(solved.values()) == {example_often: 10, example_seldom: example_words - 10}
    assert not set(solved) & set(counts) and sample.prompt.count("\nQuestion:") == 2
    common = {word for word, count in solved.items() if count == example_often}
    answer = example.rpartition(" in the list are:")[2]
    assert re.fullmatch(" " + " ".join(rf"{i}\. [a-z]+" for i in range(1, 11)), answer)
    assert set(re.findall("[a-z]+", answer)) == common and len(sample.references) == 10


def test_the_solved_example_of_cwe_names_ten_words_however_long_the_list(folder):
    made = task("ruler_cwe", folder)
    for number in range(5):
        sample = composed(made, number, units=16_000, length=1 << 20)
        answer = sample.prompt.rpartition("\nBelow is a numbered list")[0].rpartition(" in the list are:")[2]
        assert re.fullmatch(" " + " ".join(rf"{i}\. [a-z]+" for i in range(1, 11)), answer)


def test_cwe_has_its_small_form_by_default_where_the_large_one_leaves_no_room(folder, subwords):
    small, large = task("ruler_cwe", folder), task("ruler_cwe", folder, subwords)
    assert [occurrences(made, 4096) for made in (small, large)] == [SMALL, SMALL]
    assert occurrences(small, 16384) == occurrences(large, 16384) == LARGE
    # Of `faithful` the length alone decides, whatever tokenizer reads it.
    for name in ("bytes", subwords):
        kept = task("ruler_cwe", folder, name, faithful=True)
        assert [occurrences(kept, length) for length in (4095, 4096)] == [SMALL, LARGE]


def test_cwe_is_a_numbered_list_of_wonderwords(folder):
    found = {word for kind in ("noun", "adjective", "verb") for word in wonderwords.RandomWord.read_words(f"{kind}list.txt")}
    sample = composed(task("ruler_cwe", folder), units=3000, length=131072)
    numbers = [int(number) for number in re.findall(r"(\d+)\. [a-z]+", sample.prompt.rpartition("occur most often.\n")[2])]
    assert set(listed(sample.prompt)) <= found and len(set(listed(sample.prompt))) == 3000
    assert numbers == list(range(1, 10 * 30 + 2990 * 3 + 1))
    kinds = [{word for word in words.listed(kind)} for kind in ("noun", "adjective", "verb")]
    assert all(len(kind & set(listed(sample.prompt))) > 200 for kind in kinds)


# --- Frequent words. ---


def test_how_often_words_of_fwe_occur(folder):
    sample = composed(task("ruler_fwe", folder), units=1000, length=8192)
    (dots, most), *others = collections.Counter(coded(sample.prompt)).most_common()
    # floor(1000 k^-2 / zeta(2)), which is 0 from rank 25 on.
    expected = [607, 151, 67, 37, 24, 16, 12, 9, 7, 6, 5, 4, 3, 3, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1]
    assert (dots, most) == ("...", 607) and [count for _, count in others] == expected[1:]
    assert sample.references == tuple(word for word, _ in others[:3])
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in others)


def test_shares_of_the_words_of_fwe(folder):
    sample = composed(task("ruler_fwe", folder), units=100_000, length=131072)
    found = [100 * count / 100_000 for _, count in collections.Counter(coded(sample.prompt)).most_common(5)]
    np.testing.assert_allclose(found, [60.8, 15.2, 6.75, 3.80, 2.43], atol=0.011)


@pytest.mark.parametrize(("length", "vocabulary"), [(1024, 19), (4096, 80), (8192, 162)])
def test_the_vocabulary_of_fwe(length, vocabulary, folder):
    # Far more words than fit, so that all of the vocabulary occur; the dots are one of them.
    found = set(coded(composed(task("ruler_fwe", folder), units=3 * vocabulary**2, length=length).prompt))
    assert len(found) == vocabulary == (length - 50) // 50 and "..." in found


def test_the_words_of_fwe_differ_from_sample_to_sample(folder):
    made = task("ruler_fwe", folder)
    found = {composed(made, number).references for number in range(20)}
    assert len({word for references in found for word in references}) == 60


# --- Questions about documents. ---


def asked_towns(sample):
    """(article, paragraph) of the question, and of every document in the order of the prompt."""
    town = re.findall(r"harbour of town (\d+)-(\d+)\?", sample.prompt)[-1]
    return town, [re.search(r"town (\d+)-(\d+) ", text).groups() for text in documents(sample.prompt)]


def test_only_answerable_questions_of_squad_are_asked(tmp_path):
    asked = [
        {"question": "one", "answers": [{"text": "1"}, {"text": "one"}, {"text": "1"}]},
        {"question": "two", "answers": [], "is_impossible": True, "plausible_answers": [{"text": "2"}]},
        {"question": "three", "answers": [{"text": "3"}], "is_impossible": True},
        {"question": "four", "answers": []},
        {"question": "five", "answers": [{"text": "5"}], "is_impossible": False},
    ]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "All.", "qas": asked}, {"context": "None.", "qas": []}]}]}))
    questions = ruler_qa.read(str(path), "evals.questions.qa_1").questions
    assert [(question.text, question.answers) for question in questions] == [("one", ("1", "one")), ("five", ("5",))]


@pytest.mark.parametrize("faithful", [False, True])
def test_qa_1_takes_the_gold_paragraph_then_its_article_then_others(faithful, folder):
    made = task("ruler_qa_1", folder, faithful=faithful)
    # A unit is a document of `faithful`, and else a word, of which a document has 56.
    each = 1 if faithful else len(made.reading.documents[0].split())
    for number in range(6):
        for total in (5, 12, 30):
            town, found = asked_towns(composed(made, number, units=(total - (not faithful)) * each))
            assert len(found) == len(set(found)) == total and town in found
            of_article = [other for other in found if other[0] == town[0]]
            assert len(of_article) == min(total, 12)
    # The others come from the whole file.
    assert len({article for article, _ in found}) > 4


@pytest.mark.parametrize("faithful", [False, True])
def test_qa_repeats_the_documents_when_there_are_too_few(faithful, folder):
    made = task("ruler_qa_1", folder, faithful=faithful)
    each = 1 if faithful else len(made.reading.documents[0].split())
    town, found = asked_towns(composed(made, units=(1 + 2 * 95 + 40 - (not faithful)) * each))
    counts = collections.Counter(found)
    # The pool has 96; the gold paragraph stands once.
    assert len(counts) == 96 and counts.pop(town) == 1 and collections.Counter(counts.values()) == {2: 55, 3: 40}


@pytest.mark.parametrize("faithful", [False, True])
def test_qa_2_takes_the_ten_documents_of_the_item_then_others(faithful, folder):
    made = task("ruler_qa_2", folder, faithful=faithful)
    for number in range(4):
        sample = composed(made, number, units=20 if faithful else 1000)
        found = documents(sample.prompt)
        hill = re.findall(r"past hill (\d+)\?", sample.prompt)[-1]
        own = [text for text in found if re.match(rf"Hill {hill}(-\d)?\n", text)]
        assert len(own) == 10 and len(found) > 12 and sample.references == (f"River{hill}z",)
        # The title, a line break, and the sentences as they stand in the file.
        assert f"Hill {hill}\nHill {hill} is green. River{hill}z flows past it." in own
    assert faithful is (len(found) == 20)


def test_documents_are_numbered_from_one(folder):
    prompt = composed(task("ruler_qa_1", folder), units=500).prompt
    numbers = [int(number) for number in re.findall(r"^Document (\d+):$", prompt, re.MULTILINE)]
    assert numbers == list(range(1, len(documents(prompt)) + 1)) and len(numbers) > 5


# --- Quirk 1: the place of what is asked for is the same in every sample. ---


def place_of_gold(made, number, units):
    sample = composed(made, number, units=units)
    found = documents(sample.prompt)
    return [i for i, text in enumerate(found) if sample.references[0] in text][0] / (len(found) - 1)


@pytest.mark.parametrize(("count", "depth"), [(20, 0.95), (50, 0.39), (100, 0.71), (200, 0.28), (400, 0.59), (800, 0.78)])
def test_quirk_1_the_gold_document_has_one_place_under_faithful_and_any_by_default(count, depth, folder):
    kept, made = task("ruler_qa_1", folder, faithful=True), task("ruler_qa_1", folder)
    assert {round(place_of_gold(kept, number, count), 2) for number in range(8)} == {depth}
    words_ = count * len(made.reading.documents[0].split())
    places = [place_of_gold(made, number, words_) for number in range(24)]
    assert len({round(place, 2) for place in places}) > 10 and min(places) < 0.3 and max(places) > 0.7


@pytest.mark.parametrize(("name", "text_of"), [("ruler_cwe", listed), ("ruler_fwe", coded)])
def test_quirk_1_answers_have_the_same_places_under_faithful_and_others_by_default(name, text_of, folder):
    def places(made, number):
        sample = composed(made, number)
        return tuple(i for i, word in enumerate(text_of(sample.prompt)) if word in sample.references)

    kept, made = task(name, folder, faithful=True), task(name, folder)
    assert len({places(kept, number) for number in range(8)}) == 1
    assert len({places(made, number) for number in range(8)}) == 8


def test_quirk_1_needles_have_one_order_under_faithful_and_any_by_default(folder):
    def order(made, number):
        sample = composed(made, number)
        return tuple(sample.references.index(value) for _, value in needles(sample.prompt))

    kept, made = (task("ruler_niah_multivalue", folder, faithful=faithful) for faithful in (True, False))
    fixed = list(range(4))
    random.Random(42).shuffle(fixed)
    assert {order(kept, number) for number in range(20)} == {tuple(fixed)}
    assert len({order(made, number) for number in range(60)}) > 15


# --- Quirk 2: the first questions of the file. ---


@pytest.mark.parametrize("name", ["ruler_qa_1", "ruler_qa_2"])
def test_quirk_2_questions_come_in_order_under_faithful_and_are_sampled_by_default(name, folder):
    kept, made = task(name, folder, faithful=True), task(name, folder)

    def asked(of, count):
        return [item.text.rpartition("Question: ")[2].partition("\n")[0].split(" Answer:")[0] for item in of.items(8192, count)]

    in_order = [question.text for question in kept.reading.questions]
    assert asked(kept, 10) == in_order[:10]
    assert composed(kept, len(in_order) + 3).prompt.endswith(f"Question: {in_order[3]}")
    drawn = asked(made, 30)
    assert set(drawn) <= set(in_order) and len(set(drawn)) > 12
    numbers = [in_order.index(question) for question in drawn]
    assert numbers != sorted(numbers) and max(numbers) > 0.8 * len(in_order)
    if name == "ruler_qa_1":
        # The file begins with one article.
        assert len({question.split("-")[0] for question in asked(kept, 10)}) == 1 and len({x.split("-")[0] for x in drawn}) > 4


# --- Quirk 3: steps in size, and no end of the search where nothing fits. ---

STEPS = {
    "ruler_niah_single_1": (25, 5),
    "ruler_niah_single_2": (500, 500),
    "ruler_niah_multikey_2": (25, 5),
    "ruler_vt": (10, 5),
    "ruler_cwe": (10, 10),
    "ruler_qa_1": (10, 10),
    "ruler_qa_2": (10, 10),
}


def size(name, text):
    """Lines, words or documents of a prompt without its needles, as RULER counts them."""
    if "single_2" in name:
        return len(re.sub(NEEDLE, "", text.split("\n")[1]).split())
    if "niah" in name:
        return len(text.split("\n")) - 3
    if "vt" in name:
        return len(text.rpartition("memorise it.\n\n")[2].partition("\nQuestion:")[0].split("\n")) - 5
    return len(set(listed(text))) if "cwe" in name else len(documents(text))


@pytest.mark.parametrize("name", STEPS)
def test_quirk_3_sizes_go_in_steps_under_faithful_and_one_by_one_by_default(name, folder):
    # Lengths from 4,096 on, and shorter ones.
    for lengths, step in zip(
        ((8200, 9500, 11000, 13500, 16384), (2600, 2700, 2800, 3000, 3450, 3700, 3900)), STEPS[name], strict=True
    ):
        kept, made = (task(name, folder, faithful=faithful) for faithful in (True, False))
        length, sizes = lengths[-1], set()
        for tried in lengths:
            with contextlib.suppress(UserError):
                sizes.update(size(name, item.text) for item in kept.items(tried, 1))
        assert math.gcd(*sizes) == step, sizes
        if "qa" in name:
            # By default the last of the other documents is cut where the length is full.
            whole = set(made.reading.documents)
            cut, uncut = ([len(set(documents(item.text)) - whole) for item in of.items(length, 3)] for of in (made, kept))
            assert set(cut) in ({1}, {0, 1}) and set(uncut) == {0}
        else:
            finer = {item.units for item in made.items(length, 3)}
            assert any(found % made.step(length) for found in finer), finer


@pytest.mark.parametrize("name", STEPS)
def test_quirk_3_prompts_are_full_by_default_but_not_under_faithful(name, folder):
    kept, made = (task(name, folder, faithful=faithful) for faithful in (True, False))

    def fills(of, length):
        return [(of.counted(len(item.prompt)) + of.new_tokens(length)) / length for item in of.items(length, 1)]

    lengths = range(3900, 4096, 39)
    full = [fill for length in lengths for fill in fills(made, length)]
    stepped = [fill for length in lengths for fill in fills(kept, length)]
    assert 0.97 <= min(full) <= max(full) <= 1 and min(stepped) < min(full) and max(stepped) <= 1


@pytest.mark.parametrize("length", [4096, 10_000, 16384])
def test_quirk_3_the_text_of_fwe_is_a_sixth_of_the_length_and_steps_of_a_32nd_under_faithful(length, folder):
    made = task("ruler_fwe", folder)

    def dots(of):
        return coded(of.items(length, 1)[0].text).count("...")

    # A word has between 5 and 6 bytes on average: one step more than a sixth does not fit.
    assert dots(task("ruler_fwe", folder, faithful=True)) == int(length // 6 * 6 / np.pi**2)
    assert dots(made) > int(length // 6 * 6 / np.pi**2)


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("name", RULER)
def test_quirk_3_the_search_ends_with_an_error_where_the_smallest_prompt_does_not_fit(name, faithful, folder, monkeypatch):
    made, calls = task(name, folder, faithful=faithful), itertools.count()
    compose = type(made).compose

    def counted(self, draw, units):
        assert next(calls) < 50, "the search goes on and on"
        return compose(self, draw, units)

    monkeypatch.setattr(type(made), "compose", counted)
    for refused in (functools.partial(made.items, count=1), made.check):
        with pytest.raises(UserError, match=rf"evals.lengths has 256, but {name} takes at least [\d,]+ tokens .*use longer ones"):
            refused(256)


@pytest.mark.parametrize(("name", "length"), [("ruler_niah_single_2", 3000), ("ruler_qa_1", 2000)])
def test_quirk_3_a_length_below_the_first_step_is_refused_under_faithful_before_anything_is_asked(name, length, folder):
    made, kept = (task(name, folder, faithful=faithful) for faithful in (False, True))
    made.check(length)
    assert len(made.items(length, 1)) == 1
    for refused in (functools.partial(kept.items, count=1), kept.check):
        with pytest.raises(UserError, match=rf"{name} takes at least [\d,]+ tokens"):
            refused(length)


@pytest.mark.parametrize("content", ["squad", "hotpot"])
def test_quirk_3_a_file_with_nothing_to_fill_a_length_with_is_refused(content, tmp_path):
    path, asked = tmp_path / "alone.json", {"question": "What?", "answer": "All", "answers": [{"text": "All"}]}
    item = {**asked, "supporting_facts": [["One", 0]], "context": [["One", ["All."]]]}
    alone = [item] if content == "hotpot" else {"data": [{"paragraphs": [{"context": "All.", "qas": [asked]}]}]}
    path.write_text(json.dumps(alone))
    with pytest.raises(UserError, match="evals.questions.qa_1='.*' has no documents but those of one question"):
        ruler_qa.read(str(path), "evals.questions.qa_1")


@pytest.mark.parametrize("seed", range(5))
def test_quirk_3_the_search_ends_whatever_sizes_it_is_told(seed):
    rng, told, calls = random.Random(seed), {}, itertools.count()

    def compose(units):
        assert next(calls) < 80, "the search goes on and on"
        return told.setdefault(units, 40 + units * 7 + rng.randrange(-30, 31)), units

    units, tokens, sample = largest(compose, 5000, 1, rng.choice([1, 50, 5000]))
    assert tokens <= 5000 and sample == units and tokens == told[units] and tokens > 4900
    assert largest(compose, 5, 1, 9) is None


# --- Quirk 4: singular forms change the words of a chat template, too. ---


def in_chat(name, folder, template):
    """The task in a chat format."""
    path = folder / "chat.jinja"
    path.write_text(template)
    questions = QuestionConfig(2, prompt_format="chat", qa_1=squad(folder / "squad.json"))
    data = DataConfig(chat_template=str(path))
    return TASKS[name](Materials(EvalConfig(questions=questions), data, tokenizers.load("bytes"), None))


SYSTEM = "<|system|>You are helpful. Some users are in a hurry.<|end|>"
TEMPLATE = SYSTEM + "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"


@pytest.mark.parametrize("name", NEEDLES)
def test_quirk_4_singular_forms_leave_the_chat_template_alone(name, tmp_path):
    for item in in_chat(name, tmp_path, TEMPLATE).items(4096, 2):
        assert item.text.startswith(SYSTEM + "<|user|>")
        several = "multivalue" in name or "multiquery" in name
        begin, question, end = (
            ("Some special magic numbers are", "What are all the", "are") if several else ("A", "What is the", "is")
        )
        assert item.text.removeprefix(SYSTEM + "<|user|>").startswith(begin + " ")
        assert f"\n{question} special magic" in item.text and item.text.endswith(f" {end}")


@pytest.mark.parametrize("faithful", [False, True])
def test_quirk_4_singular_forms_leave_the_context_alone(faithful, folder):
    made = task("ruler_niah_single_2", folder, faithful=faithful)
    sentence = "Some of them are here and you are there."
    sample = composed(dataclasses.replace(made, prose=Prose([sentence], "a test")), units=90)
    assert sample.prompt.count(sentence) == 10 and sample.prompt.startswith("A special magic number is hidden")


# --- Quirk 5: prompts without the answer prefix. ---


@pytest.mark.parametrize("form", ["base", "chat"])
@pytest.mark.parametrize("name", [name for name in RULER if name != "ruler_qa_2"])
def test_quirk_5_the_prompt_that_a_model_reads_ends_in_the_prefix(name, form, folder, tmp_path):
    made = task(name, folder) if form == "base" else in_chat(name, tmp_path, TEMPLATE)
    (item,) = made.items(8192, 1)
    assert re.fullmatch(TABLE[name][2], item.prefix)
    read = made.format.tokenizer.decode(item.prompt)
    header = "<|end|><|assistant|>" if form == "chat" else ""
    assert read.endswith(header + (item.prefix.lstrip() if header else item.prefix)) and read == item.text
    # The prefix counts towards the length.
    assert 0.97 * 8192 <= len(read.encode()) + made.new_tokens(8192) <= 8192


def test_quirk_5_what_is_kept_of_a_prompt_ends_in_the_prefix(folder, tmp_path):
    made, path = task("ruler_niah_single_1", folder), tmp_path / "answers.jsonl"
    made.measure(Reader(made.name), 2048, 2, AnswerLog(path))
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["asked"][-60:] for entry in kept] == [item.text[-60:] for item in made.items(2048, 2)]
    assert all(re.search(TABLE["ruler_niah_single_1"][2] + "$", entry["asked"]) for entry in kept)


# --- Quirk 6: answers that are part of other words. ---


def inside_others(sample):
    """How often answers of cwe are part of other words of the lists."""
    found = set(listed(sample.prompt)) | set(listed(sample.prompt.rpartition("\nBelow is")[0]))
    return sum(answer in word for answer in sample.references for word in found if word != answer)


def test_quirk_6_answers_of_cwe_are_part_of_other_words_under_faithful_but_not_by_default(folder):
    kept, made = task("ruler_cwe", folder, faithful=True), task("ruler_cwe", folder)
    assert sum(inside_others(composed(kept, number, units=3000)) for number in range(10)) > 5
    assert sum(inside_others(composed(made, number, units=3000)) for number in range(10)) == 0


@pytest.mark.parametrize("name", [*NEEDLES, "ruler_vt", "ruler_fwe"])
def test_quirk_6_no_answer_is_part_of_another_or_of_anything_else(name, folder):
    made = task(name, folder)
    for number in range(10):
        sample = composed(made, number)
        text = (sample.prompt + sample.prefix).lower()
        for answer in map(str.lower, sample.references):
            assert text.count(answer) == len(re.findall(rf"(?<![\w-]){answer}(?![\w-])", text)) > 0
            assert not any(answer in other.lower() for other in sample.references if other.lower() != answer)
        assert not re.search(r"\d{8}", text) or "uuid" in text


def test_quirk_6_the_whole_output_is_kept(folder, tmp_path):
    made, path = task("ruler_cwe", folder), tmp_path / "answers.jsonl"

    class Talkative(Reader):
        def answers(self, items):
            return ["word " * 5000] * len(items)

    made.measure(Talkative(made.name), 4096, 1, AnswerLog(path))
    (entry,) = map(json.loads, path.read_text().splitlines())
    assert len(entry["output"]) == 25_000 and entry["score"] == 0


# --- Quirk 7: names and values that occur twice. ---


@pytest.mark.parametrize("faithful", [False, True])
def test_quirk_7_variables_are_distinct_and_none_is_called_var(faithful, folder, monkeypatch):
    draws = {
        3: itertools.cycle(["VAR", "AAA", "AAA", "THE", "BBB", "SKY", "CCC", "AAA", "DDD", "EEE"]),
        5: itertools.cycle(["GREEN", "GRASS", "AAAAA", "AAAAA", "BBBBB", "AGAIN", "CCCCC", "BBBBB", "DDDDD", "EEEEE"]),
    }
    made = task("ruler_vt", folder, faithful=faithful)
    example_units(made, 8192)
    monkeypatch.setattr(words, "letters", lambda rng, count, alphabet="": next(draws[count]))
    sample = composed(made)
    solved, chain = chains(sample.prompt)
    assert [name for name, _ in solved] == ["AAA", "BBB", "CCC", "DDD", "EEE"]
    assert [name for name, _ in chain] == list(sample.references) == ["AAAAA", "BBBBB", "CCCCC", "DDDDD", "EEEEE"]


@pytest.mark.parametrize("faithful", [False, True])
def test_quirk_7_the_values_of_the_example_and_of_the_question_differ(faithful, folder):
    class Alike(random.Random):
        """Draws 54321 twice, and then other numbers."""

        drawn = 0

        def randrange(self, start, stop):
            self.drawn += 1
            return 54321 + self.drawn // 3

    sample = task("ruler_vt", folder, faithful=faithful).compose(Draw(Alike(0), 8192, 0), 50)
    solved, chain = chains(sample.prompt)
    assert (solved[0][1], chain[0][1]) == ("54321", "54322")


@pytest.mark.parametrize(
    ("name", "drawing"), [("multikey_1", "key"), ("multikey_2", "key"), ("multivalue", "number"), ("multiquery", "number")]
)
def test_quirk_7_keys_and_values_of_needles_are_distinct(name, drawing, folder, monkeypatch):
    drawn, of = collections.Counter(), getattr(words, drawing)

    def repeating(rng):
        """Everything comes twice in a row."""
        drawn["all"] += 1
        if drawn["all"] % 2:
            drawn["last"] = of(rng)
        return drawn["last"]

    monkeypatch.setattr(words, drawing, repeating)
    found = needles(composed(task(f"ruler_niah_{name}", folder), units=50).prompt)
    assert len({value for _, value in found}) == len(found) > 3 and drawn["all"] > 6
    assert len({key for key, _ in found}) == (1 if name == "multivalue" else len(found))


# --- Quirk 8: too few words for long lists. ---


def test_quirk_8_the_words_of_cwe_suffice_for_a_million_bytes(folder):
    assert len(set(words.unique_words(random.Random(0), 25_000))) == 25_000
    made = task("ruler_cwe", folder)
    (item,) = made.items(1 << 20, 1)
    found = collections.Counter(listed(item.text))
    supply = len(words.vocabulary())
    assert len(item.prompt) + made.new_tokens(1 << 20) >= 0.97 * (1 << 20) and supply < 9000 < 16_000 < len(found)
    assert collections.Counter(found.values()) == {30: 10, 3: len(found) - 10}
    # What goes beyond the list is an adjective and a noun in one word, and no answer is part of it.
    beyond = sorted(found.keys() - set(words.vocabulary()))
    adjectives, nouns = set(words.listed("adjective")), set(words.listed("noun"))
    assert len(beyond) > 8_000 and all(
        any(word[:i] in adjectives and word[i:] in nouns for i in range(1, len(word))) for word in beyond[:500]
    )
    assert not any(answer in word for answer in item.references for word in found if word != answer)


# --- Quirk 9: downloads. ---


class Reached(Exception):
    """Something asked for the network."""


def test_quirk_9_nothing_is_downloaded(folder, monkeypatch):
    def refuse(*_, **__):
        raise Reached

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    with pytest.raises(Reached):
        urllib.request.urlopen("http://127.0.0.1:9/")
    # Neither is a library with downloads of its own asked.
    for library in ("nltk", "datasets", "requests", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, library, None)
    for cached in (standard_library, words.listed, words.vocabulary, ruler_qa._read):
        cached.cache_clear()
    for name in RULER:
        made = task(name, folder)
        rows = {row.metric: row.value for row in made.measure(Reader(name), 4096, 1, AnswerLog(None))}
        assert rows["score"] == 1 and rows["fill"] > 0.97


# --- Quirk 10: the search and the samples draw from one stream. ---


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("name", RULER)
def test_quirk_10_an_item_does_not_depend_on_how_many_are_made(name, faithful, folder):
    made, length = task(name, folder, faithful=faithful), 16384
    three = [item.text for item in made.items(length, 3)]
    assert [item.text for item in made.items(length, 1)] == three[:1] and [item.text for item in made.items(length, 2)] == three[:2]
    assert len(set(three)) == 3


@pytest.mark.parametrize("name", [name for name in RULER if name != "ruler_cwe"])
def test_quirk_10_the_question_does_not_depend_on_the_tokenizer(name, folder, subwords):
    asked = [
        [(item.references, item.prefix) for item in task(name, folder, tokenizer).items(8192, 3)]
        for tokenizer in ("bytes", subwords)
    ]
    assert asked[0] == asked[1] and len({references for references, _ in asked[0]}) > 1


@pytest.mark.parametrize("name", RULER)
def test_quirk_10_a_sample_does_not_depend_on_what_was_composed_before(name, folder):
    made = task(name, folder)
    alone = [composed(made, number) for number in range(3)]
    for number in (2, 0, 1):
        composed(made, number, units=UNITS[name.split("_")[1]] + 17)
        assert composed(made, number) == alone[number]


def test_quirk_10_items_change_with_task_length_seed_and_version(folder, monkeypatch):
    def asked(made, length=8192):
        return made.items(length, 1)[0].references

    made = task("ruler_niah_single_1", folder)
    seen = [asked(made), asked(made, 8193), asked(dataclasses.replace(made, seed=1)), asked(dataclasses.replace(made, name="b"))]
    monkeypatch.setattr(type(made), "version", 99)
    seen.append(asked(made))
    assert len(set(seen)) == 5
