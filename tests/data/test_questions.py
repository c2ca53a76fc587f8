"""Training questions in words: exact rows, right answers, and nothing of an evaluation's."""

import random
import re

import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.data.chat.chat import Chat, Template
from lcx.data.chat.frame import chat_frame
from lcx.data.config import DataConfig, PartConfig
from lcx.data.loader import Loader, probe
from lcx.data.synthetic import words
from lcx.data.synthetic.questions import QuestionsConfig, QuestionTask
from lcx.data.synthetic.skills import SKILLS
from lcx.data.tokenizers.tokenizers import Bytes
from lcx.evals.tasks.table import WORDS
from lcx.evals.text import words as evaluation_words
from tests.evals.text_cases import task

PROSE = " ".join(f"Sentence number {i} of the prose says nothing that matters here, or there." for i in range(4000))


class Stream:
    """Prose as one stream of tokens."""

    def __init__(self, tokenizer):
        self.tokens = tokenizer.encode(PROSE)
        self.num_tokens = len(self.tokens)

    def windows(self, starts, length):
        return np.stack([self.tokens[start : start + length] for start in starts])


class Fours(Bytes):
    """Up to four bytes a token, so that there are few tokens and none is a character."""

    vocab_size = 8192
    fingerprint = "fours"

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "ids", {})

    def encode(self, text):
        raw = text.encode()
        return np.array([self.ids.setdefault(raw[i : i + 4], len(self.ids)) for i in range(0, len(raw), 4)], np.int32)

    def decode(self, tokens):
        known = list(self.ids)
        return b"".join(known[token] for token in tokens if token < len(known)).decode(errors="replace")


def rows_of(skill, length=1024, count=24, tokenizer=None, frame=None, **config):
    tokenizer = tokenizer or Bytes()
    task = QuestionTask(QuestionsConfig(skills=(skill,), **config), tokenizer, frame)
    uniforms = np.random.default_rng(0).random((count, task.uniforms(length)))
    return tokenizer, task.rows(uniforms, length, Stream(tokenizer))


def texts(tokenizer, rows):
    return [tokenizer.decode(row) for row in rows.tokens]


def asked(text):
    """Context, and pairs of question and answer, of a row in plain text."""
    context, *pairs = re.split(r"\nQuestion: ", text)
    return context, [tuple(part.strip("\n") for part in pair.split("\nAnswer:")) for pair in pairs]


# A cloze needs a passage that occurs once, and the prose of the tests repeats itself: in 400 bytes there is none.
@pytest.mark.parametrize(("skill", "length"), [(s, n) for s in SKILLS for n in (400, 1024, 5000) if (s, n) != ("cloze", 400)])
def test_rows_are_exactly_as_long_as_asked_and_weigh_answers(skill, length):
    tokenizer, rows = rows_of(skill, length, 6, answer_weight=5.0, fact_weight=0.25, question_weight=0.125, haystack_weight=2.0)
    assert rows.tokens.shape == rows.loss_weights.shape == rows.answers.shape == (6, length + 1)
    assert rows.skills == (skill,) * 6
    for text, row, weights, answers in zip(texts(tokenizer, rows), *rows[:3], strict=True):
        context, pairs = asked(text)
        assert 1 <= len(pairs) <= 3 and all(len(pair) == 2 for pair in pairs)
        # The answers, with the line break behind each, have the answers' weight, and nothing else has.
        marked = tokenizer.decode(row[answers])
        assert marked == "".join(f"{answer}\n" for _, answer in pairs)
        assert np.all(weights[answers] == 5.0) and np.all(weights[~answers] < 5.0)
        kinds = set(np.unique(weights[: len(context)]).tolist())
        assert kinds <= {0.25, 0.125, 2.0}
        assert 0.125 in kinds and (2.0 in kinds or skill not in ("retrieval", "tracking", "copying", "cloze"))


def test_facts_are_told_and_found_again():
    tokenizer, rows = rows_of("retrieval", 2048, facts=9)
    depths = []
    for context, pairs in map(asked, texts(tokenizer, rows)):
        for question, answer in pairs:
            values = answer.strip().split(", ")
            places = [context.find(value) for value in values]
            assert -1 not in places and places == sorted(places), (question, answer)
            depths += [place / len(context) for place in places]
    assert min(depths) < 0.15 and max(depths) > 0.85 and 0.35 < np.mean(depths) < 0.65


def test_looked_up_values_stand_in_the_line_of_their_key():
    tokenizer, rows = rows_of("lookup")
    for context, pairs in map(asked, texts(tokenizer, rows)):
        for question, answer in pairs:
            lines = [line for line in context.split("\n") if answer.strip() in line]
            assert any(re.search(rf"\b{word}\b", line) for line in lines for word in re.findall(r"\w+", question) if len(word) > 4)


TOLD = r"Let (\w+) stand for ([\w-]+)\.|box (\w+) is filled with ([\w-]+)\.|register (\w+) <- ([\w-]+);"
PASSED = (
    r"on (\w+) stands for whatever (\w+) does|box (\w+) gets the same contents as the box (\w+)|"
    r"register (\w+) <- register (\w+)"
)


def test_chains_are_followed_to_their_end():
    tokenizer, rows = rows_of("tracking", 2048, facts=9, hops=2)
    seen = set()
    for context, pairs in map(asked, texts(tokenizer, rows)):
        told = re.findall(TOLD, context)
        passed = re.findall(PASSED, context)
        holds = {}
        for found in told:
            name, value = (part for part in found if part)
            holds[name] = value
        for found in passed:
            name, old = (part for part in found if part)
            holds[name] = holds[old]  # told earlier in the text
        for question, answer in pairs:
            if "In the order" in question:
                value = next(value for value in set(holds.values()) if value in question)
                assert sorted(answer.strip().split(", ")) == sorted(name for name, held in holds.items() if held == value)
                seen.add("names")
            else:
                name = next(name for name in holds if re.search(rf"\b{name}\b", question))
                assert answer.strip() == holds[name]
                seen.add("value")
    assert seen == {"names", "value"}


def test_counts_are_those_of_the_lines():
    tokenizer, rows = rows_of("counting")
    for context, pairs in map(asked, texts(tokenizer, rows)):
        lines = re.findall(r"^(\w+) (borrowed|sold|repaired|planted) a (\w+) \w+\.$", context, re.M)
        for question, answer in pairs:
            who = next((name for name in words.NAMES if f"by {name}?" in question), None)
            several = re.search(r"of the kinds (.+?) (?:borrowed|sold|repaired|planted)", question)
            kinds = several[1].split(", ") if several else [re.search(r"was a (\w+)", question)[1]]
            found = sum(who in (None, one) and what in kinds for one, _, what in lines)
            assert answer.strip() == str(found)


@pytest.mark.parametrize("skill", ["retrieval", "lookup", "tracking", "counting", "state", "learning", "copying"])
def test_answers_depend_on_what_stands_far_back(skill):
    """The words of the question stand all over the context, or answers could be had from its end."""
    tokenizer, rows = rows_of(skill, 8192, 40)
    places = []
    for context, pairs in map(asked, texts(tokenizer, rows)):
        for question, _ in pairs:
            named = [word for word in re.findall(r"[\w-]{5,}", question) if re.match("|".join(words.ONSETS), word)]
            if skill == "copying":
                named = [re.split(r"text does: |that reads: |quotation: ", question)[1]]
            # A count takes the first lines as well as the last, an example the one rare word that it shares with others.
            where = context.find if skill == "counting" else context.rfind
            found = [where(word) / len(context) for word in named if word in context]
            places += [min(found)] if skill == "learning" else found
    assert len(places) > 30 and np.mean(np.array(places) < 0.5) > 0.2


def test_states_are_the_last_and_the_one_before():
    tokenizer, rows = rows_of("state", 2048)
    for context, pairs in map(asked, texts(tokenizer, rows)):
        moves = re.findall(r"carried the (\w+) to the (\w+)\.|^(\w+): shipped to (\w+) by|\] mv (\w+) (\w+)/", context, re.M)
        history = {}
        for move in moves:
            thing, place = (part for part in move if part)
            history.setdefault(thing, []).append(place)
        assert len(moves) > 20
        for question, answer in pairs:
            thing = next(name for name in history if re.search(rf"\b{name}\b", question))
            before = "before" in question or "leave" in question
            assert answer.strip() == history[thing][-2 if before else -1]


def test_the_mark_of_an_example_follows_from_the_others():
    tokenizer, rows = rows_of("learning", 2048)
    for context, pairs in map(asked, texts(tokenizer, rows)):
        shown = re.findall(r"^(?:in: )?(\w+ \w+ \w+ \w+) (?:=> |\[|out: )(\w+)\]?$", context, re.M)
        by_word = {}
        for example, label in shown:
            for word in example.split():
                by_word.setdefault(word, set()).add(label)
        for question, answer in pairs:
            new = question.removeprefix("Which mark does this get: ").split()
            told = [by_word[word] for word in new if word in by_word and len(by_word[word]) == 1]
            assert {answer.strip()} in told


def test_quotations_go_on_as_the_text_does():
    tokenizer, rows = rows_of("copying", 4096)
    for context, pairs in map(asked, texts(tokenizer, rows)):
        for question, answer in pairs:
            quote = re.split(r"text does: |that reads: |quotation: ", question)[1]
            assert context.count(quote + answer) == 1 and context.count(quote) == 1


@pytest.mark.parametrize("skill", SKILLS)
def test_any_tokenizer_fills_rows_exactly(skill):
    tokenizer, rows = rows_of(skill, 512, 6, tokenizer=Fours())
    assert rows.tokens.shape == (6, 513)
    for row, answers in zip(rows.tokens, rows.answers, strict=True):
        assert tokenizer.decode(row).count("Question: ") >= 1 and answers.any()


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize("skill", ["retrieval", "counting", "copying"])
def test_chats_ask_by_turns_and_learn_the_end_of_each(skill):
    tokenizer = Bytes()
    frame = chat_frame(Chat(tokenizer, Template(TEMPLATE, {})))
    _, rows = rows_of(skill, 1500, 6, frame=frame)
    for row, answers in zip(rows.tokens, rows.answers, strict=True):
        text = tokenizer.decode(row)
        turns = re.findall(r"<\|(user|assistant)\|>\n(.*?)<\|end\|>\n", text, re.S)
        assert "".join(f"<|{role}|>\n{said}<|end|>\n" for role, said in turns) == text
        assert [role for role, _ in turns] == ["user", "assistant"] * 3
        written = "".join(f"{said}<|end|>" for role, said in turns if role == "assistant")
        assert tokenizer.decode(row[answers]) == written
        assert "Question:" not in text


def test_a_template_that_rewrites_messages_is_refused():
    template = Template("{% for m in messages %}{{ m.role }}: {{ m.content | upper }}{{ m.content }}\n{% endfor %}", {})
    with pytest.raises(UserError, match="does not write every message once and in order.*prompt_format=base"):
        chat_frame(Chat(Bytes(), template))(2)


def test_words_and_wording_are_apart_from_every_evaluation(tmp_path):
    rng = random.Random(0)
    invented = {words.word(rng) for _ in range(20000)}
    assert not invented & set(evaluation_words.vocabulary())
    assert not {word.lower() for word in (*words.FIRSTS, *words.SECONDS)} & set(evaluation_words.vocabulary())
    shown = set()
    for skill in SKILLS:
        tokenizer, rows = rows_of(skill, 2048, 24)
        for text in texts(tokenizer, rows):
            shown |= phrases(text)
    prompts = set()
    for name in WORDS:
        prompts |= phrases(task(name, tmp_path).items(4096, 1)[0].text)
    assert len(shown) > 1000 and len(prompts) > 1000
    assert not shown & prompts
    everything = " ".join(prompts)
    assert not [name for name in words.NAMES if re.search(rf"\b{name}\b", everything)]


def phrases(text, size=5):
    """Runs of words, numbers left out, that are not of the prose."""
    found = re.findall(r"[A-Za-z]+", text)
    prose = re.findall(r"[A-Za-z]+", PROSE[:2000])
    known = {tuple(prose[i : i + size]) for i in range(len(prose) - size)}
    runs = {tuple(found[i : i + size]) for i in range(len(found) - size + 1)} - known
    return {" ".join(run) for run in runs if "Sentence" not in run and "prose" not in run}


def config(**questions):
    part = PartConfig(kind="questions", weight=1.0, questions=QuestionsConfig(**questions))
    return DataConfig(parts={"text": PartConfig(weight=1.0), "questions": part})


def test_a_mixture_holds_questions_and_repeats_itself():
    one, other = (Loader(config(), 512, 4, seed=3) for _ in range(2))
    for step in (0, 5):
        a, b = one.batch(step), other.batch(step)
        assert all(np.array_equal(getattr(a, key), getattr(b, key)) for key in ("tokens", "targets", "loss_weights"))
        asking = [i for i, said in enumerate(one.provenance(step)) if said.startswith("questions[")]
        assert len(asking) == 2
        for i in asking:
            assert "Question: " in Bytes().decode(a.tokens[i]) and set(np.unique(a.loss_weights[i])) == {0.0, 1.0, 6.0}
    assert "6 facts and 3 questions (retrieval, lookup," in " ".join(one.provenance(0))


def test_the_probe_asks_questions():
    found = probe(config(), 512, 4, seed=0)
    assert set(np.unique(found.loss_weights[2:])) == {0.0, 1.0}
    for row in range(2, 4):
        assert "Question: " in Bytes().decode(found.tokens[row])
    assert 0 < found.loss_weights[2:].sum() < 200


def test_counts_grow_with_the_row():
    task = QuestionTask(QuestionsConfig(facts=2, facts_per_1024=1.0, questions=1, questions_per_1024=0.5), Bytes())
    assert task.counts(1024) == (2, 1) and task.counts(8192) == (8, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"skills": ("retreival",)}, "questions.skills='retreival' is unknown; did you mean 'retrieval'"),
        ({"prompt_format": "chats"}, "questions.prompt_format='chats' is unknown; did you mean 'chat'"),
        ({"facts": 0}, "questions.facts=0"),
        ({"answer_weight": 0.0}, "questions.answer_weight=0.0"),
        ({"haystack_weight": -1.0}, "questions.haystack_weight=-1.0"),
    ],
)
def test_wrong_settings_are_answered(values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        QuestionsConfig(**values)


def test_rows_that_are_too_short_and_templates_that_are_not_there_are_answered():
    with pytest.raises(UserError, match="data.parts.questions: a row of 40 tokens is too short for a question of"):
        Loader(config(), 40, 2, seed=0)
    with pytest.raises(UserError, match="data.parts.questions: .*has no chat template"):
        Loader(config(prompt_format="chat"), 512, 2, seed=0)
    small = Stream(Bytes())
    small.num_tokens = 100
    with pytest.raises(UserError, match="the haystack has 100 tokens, but a row needs 513"):
        QuestionTask(QuestionsConfig(), Bytes()).rows(np.zeros((1, 2)), 512, small)


def test_bos_begins_a_row_where_the_model_was_trained_so():
    bos = Bytes(bos=True)
    _, rows = rows_of("lookup", 512, 2, tokenizer=bos)
    assert np.all(rows.tokens[:, 0] == bos.bos_id) and np.sum(rows.tokens == bos.bos_id) == 2
