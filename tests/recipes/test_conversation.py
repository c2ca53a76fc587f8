"""Conversations: what the model sees is what the template writes, what it has seen stays in the cache, and lengths are kept to."""

import dataclasses

import numpy as np
import pytest

from lcx import api
from lcx.core.errors import UserError
from lcx.model.sampling import Sampling
from lcx.recipes import models
from lcx.recipes.conversation import Conversation, declared
from lcx.recipes.generation import chat_of
from tests import chat_model

DRAWN = Sampling(1.0, seed=7)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return models.load(chat_model.make(tmp_path_factory.mktemp("chat") / "tiny"))


@pytest.fixture(scope="module")
def chat(loaded):
    return chat_of(loaded, "tiny")


def talk(loaded, chat, **options):
    return Conversation(loaded, chat, **{"max_new_tokens": 9, "sampling": DRAWN, **options})


def test_an_answer_is_that_of_generate(loaded, chat):
    heard = []
    answer = talk(loaded, chat, system="Be brief.").ask("What is it?", heard.append)
    (same,) = api.generate(loaded, ["What is it?"], chat=True, system="Be brief.", max_new_tokens=9, temperature=1.0, seed=7)
    np.testing.assert_array_equal(answer.tokens, same.tokens)
    assert answer.text == same.text == "".join(heard)


def test_turns_are_written_by_the_template_and_kept_in_the_cache(loaded, chat):
    conversation, read = talk(loaded, chat), []
    first = conversation.ask("One?")
    second = conversation.ask("Two?", on_read=lambda done, total: read.append((done, total)))
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Two?"},
    ]
    asked = chat.prompt(messages)
    np.testing.assert_array_equal(conversation.cached[: len(asked)], asked)
    assert conversation.used == len(asked) + len(second.tokens) == read[-1][1] + len(second.tokens)
    # What was read before the first answer, at the least, was not read again.
    assert read[0][0] >= len(chat.prompt(messages[:1]))
    assert [(part.role, part.text) for part in conversation.parts()][:3] == [(m["role"], m["content"]) for m in messages]
    # A new conversation whose first question is the same goes on from what is in the cache, with another draw.
    conversation.reset()
    assert conversation.used == 0 and conversation.parts() == []
    conversation.ask("One?", on_read=lambda done, total: read.append((done, total)))
    assert read[-2][0] == len(chat.prompt(messages[:1])) - 1


def test_texts_stand_before_the_next_question(loaded, chat):
    conversation = talk(loaded, chat, texts=["A long text."])
    assert conversation.add("Another.") == 8
    assert [(part.role, part.tokens) for part in conversation.parts()] == [("before the next question", n) for n in (12, 8)]
    conversation.ask("Which?")
    assert conversation.parts()[0].text == "A long text.\n\nAnother.\n\nWhich?"
    conversation.ask("And?")
    assert conversation.parts()[2].text == "And?"
    conversation.reset()
    assert [part.text for part in conversation.parts()] == ["A long text."]


def test_ends(loaded, chat):
    whole = talk(loaded, chat, max_new_tokens=40).ask("Go on")
    assert whole.ended in ("length", "eos") and len(whole.text) > 4
    mark = whole.text[3]
    stopped = talk(loaded, chat, max_new_tokens=40, stop=[mark]).ask("Go on")
    assert (stopped.text, stopped.ended) == (whole.text.partition(mark)[0], "stop")
    # A token that ends the template's turn, whatever the model's files say.
    last = dataclasses.replace(loaded, stop_ids=(int(whole.tokens[5]),))
    ended = talk(last, chat, max_new_tokens=40).ask("Go on")
    assert ended.ended == "eos" and len(ended.tokens) == list(whole.tokens).index(whole.tokens[5]) + 1
    assert chat.end_id == 257


def test_interruptions(loaded, chat):
    conversation = talk(loaded, chat, max_new_tokens=40)
    answer = conversation.ask("Go on", is_stopped=lambda: True)
    assert (answer.text, answer.ended, conversation.parts()) == ("", "interrupted", [])
    heard = []
    answer = conversation.ask("Go on", heard.append, is_stopped=lambda: len(heard) > 2)
    assert answer.ended == "interrupted" and 0 < len(answer.tokens) < 40
    assert [part.role for part in conversation.parts()] == ["user", "assistant"]


def test_the_declared_length_is_kept_to(loaded, chat):
    conversation = talk(loaded, chat, length=60, max_new_tokens=100)
    answer = conversation.ask("Until it is full")
    assert conversation.used <= 60 and (answer.ended != "length" or conversation.used == 60)
    before = conversation.parts()
    with pytest.raises(UserError, match="the conversation has .* tokens, which leaves no room for an answer in 60"):
        conversation.ask("x" * 60)
    assert conversation.parts() == before
    conversation.reset()
    assert len(conversation.ask("Again").tokens)


@pytest.mark.parametrize(
    ("positions", "length", "wanted"),
    [("none", None, 512), ("none", 99, 99), ("yarn:factor=4", None, 2048), ("yarn", 4096, 4096), ("linear:factor=2", 600, 600)],
)
def test_declared_lengths(positions, length, wanted):
    assert declared(positions, 512, length) == wanted


def test_positions_are_tried(loaded, chat, capsys):
    scaled = talk(loaded, chat, positions="linear:factor=2")
    assert scaled.length == 2 * chat_model.LENGTH and capsys.readouterr().err == ""
    assert scaled.ask("What is it?").text != talk(loaded, chat).ask("What is it?").text
    talk(loaded, chat, length=2 * chat_model.LENGTH)
    assert "the weights were trained up to 512" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"positions": "yarn"}, "positions='yarn' names no factor; say with length=N"),
        ({"positions": "yarn:factr=4"}, "has no field 'factr'; did you mean 'factor'"),
        ({"positions": "yarn:factor=big"}, "yarn.factor='big': expected float, got str"),
        ({"positions": "yarn:factor=-4"}, "yarn.factor=-4.0 must be at least 1"),
        ({"positions": "yarm", "length": 9}, "'yarm' is unknown; did you mean 'yarn'"),
        ({"length": 1}, "length=1 must be from 2 to"),
        ({"length": 1 << 31}, "must be from 2 to 2,147,483,647 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"stop": ("",)}, "a stop string is empty"),
    ],
)
def test_wrong_options(options, says, loaded, chat):
    with pytest.raises(UserError, match=says):
        talk(loaded, chat, **options)


def test_a_model_without_template(tmp_path, loaded):
    bare = models.load(chat_model.make(tmp_path / "bare", template=None))
    with pytest.raises(UserError, match="bare has no chat template; name a file with one with --chat_template=FILE"):
        chat_of(bare, tmp_path / "bare", None, "--chat_template")
    with pytest.raises(UserError, match="has no chat template; name a file with one with data.chat_template=FILE"):
        api.generate(bare, ["a"], chat=True)
    (tmp_path / "own.jinja").write_text(chat_model.TEMPLATE)
    assert chat_of(bare, "bare", str(tmp_path / "own.jinja")).end_id == 257
    (tmp_path / "plain.jinja").write_text("{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}")
    assert chat_of(bare, "bare", str(tmp_path / "plain.jinja")).end_id is None
    with pytest.raises(UserError, match="a system message needs a chat template"):
        api.generate(loaded, ["a"], system="b")
