"""Short conversations joined into long ones: what is left out, what is written, and that the assistant alone has weight."""

import json
import re

import numpy as np
import pytest

from lcx.core.configs import build
from lcx.core.errors import UserError
from lcx.data.chat import join
from lcx.data.config import DataConfig, JoinConfig, SourceConfig
from lcx.data.loader import Loader
from lcx.data.sources import sources
from lcx.data.tokenizers.tokenizers import Bytes
from tests.data.test_chat import BLOCKS, TURNS

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""16 bytes of its own for a user's turn and 21 for an assistant's, less the text."""


def turns(*texts, system=None):
    found = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *found] if system else found


def reason(messages, tools=None, **config):
    try:
        join.reform("a", messages, tools, JoinConfig(tokens=100, **config))
    except join.Refused as error:
        return str(error)
    return None


def test_three_forms_become_one():
    expected = join.Usable("a", "", turns("Hi there.", "Hello to you, too."))
    forms = (
        turns(" Hi there.\n", "Hello to you, too. "),
        [{"from": "human", "value": "Hi there."}, {"from": "gpt", "value": "Hello to you, too."}],
        ["Hi there.", "Hello to you, too."],
        [{"role": "user", "content": [{"type": "text", "text": "Hi there."}]}, *turns("", "Hello to you, too.")[1:]],
        [*turns("Hi there.", "Hello to you, too."), {"role": "user", "content": "Still there?"}],
    )
    for form in forms:
        assert join.reform("a", form, None, JoinConfig(tokens=100)) == expected
    with_system = join.reform("a", turns("Hi there.", "Hello to you, too.", system="Be kind."), None, JoinConfig(tokens=100))
    assert with_system == join.Usable("a", "Be kind.", expected.turns)


def test_what_is_left_out_and_why():
    long = "an answer that is long enough"
    assert reason(turns("q", long)) is None
    assert reason(turns("q", long), tools=[{"name": "search"}]) == "has_tools"
    assert reason([*turns("q", long), {"role": "tool", "content": "5"}]) == "has_tools"
    assert reason("text") == reason([]) == reason([3]) == "not_a_conversation"
    assert reason(turns("q", long)[::-1]) == reason(turns("q", long)[:1] * 2) == "not_by_turns"
    assert reason([*turns("q", long), *turns("q", long)[1:]]) == "not_by_turns"
    assert reason(turns("q", long, " ", long)) == reason(turns("q", "\n", "q", long)) == "empty_turn"
    assert reason(turns("q")) == reason(turns("q", long), min_turns=2) == "too_few_turns"
    assert reason(turns("q", "short")) == "too_short" and reason(turns("q", "short"), min_chars=5) is None
    assert reason([{"role": "user", "content": None}]) == "not_text"
    assert reason([{"role": "narrator", "content": "x"}]) == "unknown_role"


def test_groups_are_full_and_hold_each_conversation_once():
    usable = [join.Usable(str(i), "", turns("q", "a" * size)) for i, size in enumerate((10, 20, 30, 40, 90, 15, 25))]
    size = lambda messages: sum(len(message["content"]) for message in messages)  # noqa: E731
    groups = join.join(usable, JoinConfig(tokens=60), size)
    assert sorted(one.name for group in groups for one in group) == list("0123456")
    sizes = [size(join.messages(group)) for group in groups]
    assert all(total <= 60 or len(group) == 1 for total, group in zip(sizes, groups, strict=True))
    # Two neighbours never fit into one, or the first of the second would be in the first.
    assert all(a + size(join.messages(group[:1])) > 60 for a, group in zip(sizes, groups[1:], strict=False))
    assert join.join(usable, JoinConfig(tokens=60), size) == groups
    assert join.join(usable, JoinConfig(tokens=60, seed=1), size) != groups


def test_a_template_that_writes_more_for_the_whole_gets_less():
    usable = [join.Usable(str(i), "", turns("q", "a" * 9)) for i in range(8)]
    squared = lambda messages: len(messages) ** 2  # noqa: E731
    groups = join.join(usable, JoinConfig(tokens=40), squared)
    assert all(squared(join.messages(group)) <= 40 for group in groups)
    assert sorted(one.name for group in groups for one in group) == list("01234567")


def test_system_messages_are_not_mixed_and_stand_in_front_once():
    usable = [join.Usable(str(i), ("", "Be kind.", "Be brief.")[i % 3], turns("q", "a")) for i in range(9)]
    groups = join.join(usable, JoinConfig(tokens=1000), len)
    assert sorted(len(group) for group in groups) == [3, 3, 3]
    for group in groups:
        roles = [message["role"] for message in join.messages(group)]
        assert roles == (["system"] if group[0].system else []) + ["user", "assistant"] * 3
        assert len({one.system for one in group}) == 1


@pytest.fixture
def files(tmp_path):
    rows = [{"messages": turns(f"Question {i}?", f"This is answer number {i}.")} for i in range(40)]
    rows += [{"messages": turns("x", "")}, {"messages": turns("x")}, rows[3], {"messages": turns("y", "z")}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    return tmp_path


def source(files, **values):
    return SourceConfig("chat", f"{files}/chats.jsonl", join=JoinConfig(**values))


def test_rows_hold_long_chats_with_weight_on_the_assistant_alone(files, capsys):
    found = sources.load(source(files, tokens=500), Bytes(), f"{files}/template.jinja")
    assert "of 44 conversations some are not joined (1 empty_turn, 1 too_few_turns, 1 repeated, 1 too_short)" in " ".join(
        capsys.readouterr().err.split()
    )
    assert len(found.lengths) < 8 and found.lengths.max() <= 500 and sorted(found.lengths)[1] > 400
    answers = []
    for i, length in enumerate(found.lengths):
        spans = np.array([i]), np.array([0]), np.array([length])
        text, weights = Bytes().decode(found.gather(*spans)), found.loss_weights(*spans)
        pairs = re.findall(r"<user>Question (\d+)\?</>\n<assistant>This is answer number (\d+)\.</>\n", text)
        assert all(a == b for a, b in pairs) and len(pairs) > 1 and found.names[i].startswith(f"{len(pairs)} from ")
        written = "".join(f"This is answer number {a}.</>" for a, _ in pairs)
        assert Bytes().decode(found.gather(*spans)[weights > 0]) == written
        answers += [int(a) for a, _ in pairs]
    assert sorted(answers) == list(range(40))


def test_a_mixture_trains_on_long_chats(files):
    values = {
        "chat_template": f"{files}/template.jinja",
        "heldout_fraction": 0.0,
        "parts": {"chats": {"source": {"kind": "chat", "path": f"{files}/chats.jsonl", "join": {"tokens": 512}}}},
    }
    one, other = (Loader(build(DataConfig, values), 512, 2, seed=1).batch(0) for _ in range(2))
    assert np.array_equal(one.tokens, other.tokens)
    assert 0.3 < (one.loss_weights > 0).mean() < 0.7


@pytest.mark.parametrize("template", [TURNS, BLOCKS])
def test_strict_templates_take_long_chats(files, template):
    (files / "template.jinja").write_text(template)
    plain = sources.load(source(files, tokens=400), Bytes(eos=True, bos=True), f"{files}/template.jinja")
    assert plain.lengths.max() <= 400 and len(plain.lengths) < 30


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JoinConfig(tokens=0), "source.join.tokens=0 must be above 0"),
        (lambda: JoinConfig(tokens=9, min_chars=-1), "source.join.min_chars=-1 must not be negative"),
        (lambda: JoinConfig(min_turns=2), "source.join.min_turns=2 has no effect without source.join.tokens; set it, or leave"),
        (
            lambda: SourceConfig("text", "x", join=JoinConfig(tokens=9)),
            "source.join.tokens=9 joins conversations, but source.kind='text'; leave it out",
        ),
    ],
)
def test_wrong_settings_say_the_way_out(make, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make()


def test_a_source_without_usable_conversations_is_answered(files):
    for call in (sources.load, sources.check):
        with pytest.raises(UserError, match=r"has no conversation that can be joined \(43 too_few_turns, 1 empty_turn\)"):
            call(source(files, tokens=500, min_turns=2), Bytes(), f"{files}/template.jinja")
