"""Rendered conversations, their tokens and their masks beside transformers; hostile templates; a run's rows of chats."""

import builtins
import json
import time

import numpy as np
import pytest
import tokenizers as library

from lcx.core.batch import PADDING
from lcx.core.configs import build
from lcx.core.errors import UserError
from lcx.data.chat import chat
from lcx.data.config import DataConfig
from lcx.data.loader import Loader
from lcx.data.report import inspect
from lcx.data.tokenizers import tokenizers

SPECIALS = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|head|>",
    "<|/head|>",
    "<|eot|>",
    "<turn>",
    "</turn>",
    "[INST]",
    "[/INST]",
]

CHATML = """{% for message in messages %}
{% if loop.first and message.role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

HEADERS = """{{- bos_token }}
{%- if not date is defined %}{%- set date = strftime_now('%Y') %}{% endif %}
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{% endif %}
{{- '<|head|>system<|/head|>\\n\\nYear ' ~ date ~ '\\n' ~ system ~ '<|eot|>' }}
{%- for message in messages %}
    {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\\n\\n' }}{%- endif %}"""

TURNS = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<turn>' + role + '\\n' + message['content'] | trim + '</turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}"""

INST = """{{ bos_token }}{% set ns = namespace(turns=0) %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{% set ns.turns = ns.turns + 1 %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}
    {%- else %}{% continue %}{% endif %}
{%- endfor %}"""

BLOCKS = """{%- macro header(role) %}{{ '<|im_start|>' ~ role }}
{% endmacro %}
{%- if tools %}{{ header('system') }}{{ tools | tojson(indent=2) }}<|im_end|>
{% endif %}
{%- for message in messages %}
{{- header(message.role) }}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content }}{% for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}<|im_end|>
{%- endgeneration %}
{%- else %}{{- message.content }}<|im_end|>{% endif %}
{{ '' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif %}"""

REAL = {"chatml": CHATML, "headers": HEADERS, "turns": TURNS, "inst": INST, "blocks": BLOCKS}
WRITTEN = {
    "chatml": "{}<|im_end|>",
    "headers": "{}<|eot|>",
    "turns": "{}</turn>",
    "inst": " {}</s>",
    "blocks": "{}<|im_end|>",
}
TALK = [
    {"role": "user", "content": "What is <b>2 + 2</b> & why? é"},
    {"role": "assistant", "content": "It is 4.\n\nBecause 東京 🙂"},
    {"role": "user", "content": "return self"},
    {"role": "assistant", "content": "def"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level tokenizer with the templates' special tokens."""
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(["What is it? It is because def return self user assistant system\n\n"] * 50, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "pad_token": "<|eot|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHATML}))
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return tokenizers.load(str(folder))


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def chat_of(tokenizer, text):
    return chat.Chat(tokenizer, chat.Template(text, tokenizer.specials))


def runs(tokenizer, ids, weights):
    """Text of each run of tokens with weight, special tokens included."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], weights, [0]])))
    return [tokenizer._tokenizer.decode(ids[a:b].tolist(), skip_special_tokens=False) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_text_and_tokens_equal_transformers(name, count, ours, theirs):
    mine, messages = chat_of(ours, REAL[name]), TALK[:count]
    for ask in (False, True):
        expected = theirs.apply_chat_template(messages, chat_template=REAL[name], tokenize=False, add_generation_prompt=ask)
        assert mine.template.render(messages, add_generation_prompt=ask)[0] == expected
    ids, _ = mine.encode(messages)
    np.testing.assert_array_equal(ids, theirs.apply_chat_template(messages, chat_template=REAL[name], return_dict=True).input_ids)
    asked = theirs.apply_chat_template(messages, chat_template=REAL[name], add_generation_prompt=True, return_dict=True)
    np.testing.assert_array_equal(mine.prompt(messages), asked.input_ids)


@pytest.mark.parametrize("name", REAL)
def test_weight_on_what_the_model_writes(name, ours):
    ids, weights = chat_of(ours, REAL[name]).encode(TALK)
    assert weights.dtype == np.float32
    assert set(weights.tolist()) == {0.0, 1.0}
    assert runs(ours, ids, weights) == [WRITTEN[name].format(message["content"]) for message in TALK[1::2]]


def test_masks_equal_transformers(ours, theirs):
    tools = [{"type": "function", "function": {"name": "add", "description": "a < b & 'c' é"}}]
    calls = [
        *TALK[:3],
        {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1, "b": [2, None]}}]},
    ]
    empty = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]
    for messages in (TALK[:1], TALK, calls, [TALK[1], TALK[3]], [{"role": "system", "content": "x"}, *TALK], empty):
        for given in (None, tools):
            expected = theirs.apply_chat_template(
                messages, tools=given, chat_template=BLOCKS, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, weights = chat_of(ours, BLOCKS).encode(messages, given)
            np.testing.assert_array_equal(ids, expected["input_ids"])
            np.testing.assert_array_equal(weights, expected["assistant_masks"])


def test_blocks_and_growing_beginnings_agree(ours):
    without = BLOCKS.replace("{%- generation %}", "").replace("{%- endgeneration %}", "{{- '' }}")
    for messages in (TALK, TALK[:2], [{"role": "system", "content": "x"}, *TALK]):
        for one, two in zip(chat_of(ours, BLOCKS).encode(messages), chat_of(ours, without).encode(messages), strict=True):
            np.testing.assert_array_equal(one, two)


def test_special_tokens_of_bytes():
    tokenizer = tokenizers.load("bytes+bos+eos")
    ids, weights = chat_of(tokenizer, INST).encode(TALK[:2])
    assert ids[0] == 256 and ids[-1] == 257
    assert bytes(ids[weights > 0][:-1].tolist()).decode() == " " + TALK[1]["content"]


def test_what_the_template_says_itself(ours):
    turns = chat_of(ours, TURNS)
    with pytest.raises(UserError, match="rejects these messages: Conversation roles must alternate"):
        turns.encode([TALK[0], TALK[0]])
    with pytest.raises(UserError, match="rejects these messages: System role not supported"):
        turns.encode([{"role": "system", "content": "x"}])


LAST_ONLY = "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last else '(cut)' }}\n{% endfor %}"
OTHER_PROMPT = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"


@pytest.mark.parametrize(
    ("template", "message"), [(LAST_ONLY, "a turn differently"), (OTHER_PROMPT, "the prompt of a turn differently")]
)
def test_templates_whose_turns_cannot_be_told(template, message, ours):
    with pytest.raises(UserError, match=message) as error:
        chat_of(ours, template).encode(TALK)
    assert "{% generation %}" in str(error.value)


@pytest.mark.parametrize("messages", [[], "hello", {"role": "user"}, ["x"], [{"content": "x"}], [{"role": 5, "content": "x"}]])
def test_what_is_no_conversation(messages, ours):
    with pytest.raises(UserError, match="not a conversation|not a message|has role="):
        chat_of(ours, CHATML).encode(messages)


def test_where_templates_come_from(folder, ours, tmp_path):
    text = "{{ messages[0].content }}"
    assert chat.load(ours).template.render(TALK)[0] == chat_of(ours, CHATML).template.render(TALK)[0]
    (tmp_path / "own.jinja").write_text(text)
    assert chat.load(ours, str(tmp_path / "own.jinja")).template.render(TALK)[0] == TALK[0]["content"]
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    near = tokenizers.load(str(tmp_path))
    with pytest.raises(UserError, match="has no chat template"):
        chat.load(near)
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": text}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert chat.load(near).template.render(TALK)[0] == TALK[0]["content"]
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert chat.load(near).template.render(TALK)[0] == "from the file"
    with pytest.raises(UserError, match="'bytes' has no chat template; name a template file with data.chat_template"):
        chat.load(tokenizers.load("bytes"))
    with pytest.raises(UserError, match="nowhere.jinja cannot be read"):
        chat.load(ours, str(tmp_path / "nowhere.jinja"))


def test_missing_library_names_the_extra(ours, monkeypatch):
    real = builtins.__import__

    def without(name, globals=None, locals=None, fromlist=(), level=0):
        if name == "jinja2" or "sandbox" in (fromlist or ()):
            raise ImportError(name)
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"need jinja2; .*\.\[hf\]"):
        chat_of(ours, CHATML)


def doubled(start, step):
    """A value that doubles forty times."""
    return f"{{% set ns = namespace(x={start}) %}}" + f"{{% set ns.x = {step} %}}" * 40 + "{{ ns.x }}"


TOO_LARGE, TOO_LONG, TOO_WIDE = "value of more than", "take more than .* iterations", "formats to a width"
HOSTILE = {
    # reaching into Python
    "{{ ''.__class__.__mro__ }}": "accesses '__class__' of a str",
    "{{ ''.__class__ }}": "accesses '__class__' of a str",
    "{{ ''|attr('__class__') }}": "accesses '__class__' of a str",
    "{{ ''['__class__'] }}": "accesses '__class__' of a str",
    "{{ messages|map(attribute='__class__')|list }}": "accesses '__class__' of a dict",
    "{{ '{0.__class__}'.format(1) }}": "accesses '__class__' of a int",
    "{{ cycler.__init__.__globals__.os }}": "accesses '__init__'",
    "{{ raise_exception.__globals__ }}": "accesses '__globals__' of a function",
    "{{ self.__init__.__globals__ }}": "accesses '__init__' of a TemplateReference",
    "{{ namespace(__class__=1) }}": "sets the attribute '__class__' of a namespace",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}": "sets the attribute '__init__' of a namespace",
    "{% include '/etc/passwd' %}": "no loader for this environment",
    "{% import 'os' as os %}": "no loader for this environment",
    # changing what it was given
    "{{ messages.append(1) }}": "accesses 'append' of a list",
    "{{ messages[0].update(role='x') }}": "accesses 'update' of a dict",
    # what is not there
    "{{ open('x') }}": "'open' is undefined",
    "{{ lipsum(n=10**9) }}": "'lipsum' is undefined",
    "{{ messages|shell }}": "No filter named 'shell'",
    # endless
    "{% for i in range(10**9) %}x{% endfor %}": "range\\(1,000,000,000\\) has more than",
    "{{ range(10**30) }}": "has more than",
    "{% for i in range(20000) %}{% for j in range(20000) %}{% endfor %}{% endfor %}": TOO_LONG,
    "{% for i in range(20000) %}{% for j in range(20000) if false %}{% endfor %}{% endfor %}": TOO_LONG,
    "{% for c in 'a' * 900000 %}{% endfor %}": TOO_LONG,
    "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}": "recurses without end",
    "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}": "recurses without end",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}": TOO_LONG,
    "{% block a %}{{ self.a() }}{% endblock %}": "recurses without end",
    # enormous
    "{% for i in range(20000) %}{{ 'x' * 900000 }}{% endfor %}": TOO_LARGE,
    "{{ 'a' * 10**10 }}": TOO_LARGE,
    "{{ [1] * 10**10 }}": TOO_LARGE,
    "{{ 10**10**10 }}": "more than 256 bits",
    "{{ 'a'.ljust(10**10) }}": "accesses 'ljust' of a str",
    "{{ 'a'|center(10**10) }}": "No filter named 'center'",
    "{{ 'a\nb'|indent(10**10) }}": TOO_LARGE,
    "{{ messages|tojson(indent=10**10) }}": TOO_LARGE,
    "{{ range(20000)|join('x' * 900000) }}": TOO_LARGE,
    "{{ ('x' * 900000).join(range(20000)|map('string')) }}": TOO_LARGE,
    "{{ '%10000000000d' % 1 }}": TOO_WIDE,
    "{{ '%*d' % (10**10, 1) }}": TOO_WIDE,
    "{{ '{:10000000000}'.format(1) }}": TOO_WIDE,
    "{{ '{:{}}'.format(1, 10**10) }}": TOO_WIDE,
    "{{ strftime_now('%10000000000d') }}": "formats the time",
    "{% macro m(n) %}" + "{{ n }}" * 5000 + "{% endmacro %}{{ m('a' * 900000) }}": TOO_LARGE,
    "{% set s = 'ab' %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 40: TOO_LARGE,
    doubled("'ab'", "ns.x ~ ns.x"): TOO_LARGE,
    doubled("'ab'", "ns.x + ns.x"): TOO_LARGE,
    doubled("'ab'", "ns.x.replace('', ns.x)"): TOO_LARGE,
    doubled("'ab'", "ns.x|replace('', ns.x)"): TOO_LARGE,
    doubled("[1]", "[ns.x, ns.x]"): TOO_LARGE,
    doubled("[1]", "(ns.x, ns.x)"): TOO_LARGE,
    doubled("[1]", "{'a': ns.x, 'b': ns.x}"): TOO_LARGE,
    doubled("[1]", "dict(a=ns.x, b=ns.x)"): TOO_LARGE,
    doubled("3", "ns.x * ns.x"): "more than 256 bits",
    "x" * 600_000: "is 600,000 characters long",
    # no template
    "{% for": "line 1: unexpected",
    "{{ 1 / 0 }}": "division by zero",
    "{{ messages[9].content }}": "no element 9",
    "{% set x %}{% generation %}a{% endgeneration %}{% endset %}b{{ x }}": "inside a macro or a captured block",
}


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:60])
def test_hostile_templates_are_refused_in_one_sentence(text):
    begun = time.thread_time()
    with pytest.raises(UserError, match=HOSTILE[text]) as error:
        chat.Template(text, {}, "hostile.jinja").render(TALK)
    sentence = str(error.value)
    assert sentence.startswith("chat template hostile.jinja is rejected: ") and "\n" not in sentence and len(sentence) < 500
    assert time.thread_time() - begun < 9  # below what the processor's time is bounded by: another bound has ended it


def test_processor_time_is_bounded(monkeypatch):
    """Large values, each allowed, in a loop that is allowed."""
    from lcx.data.chat import sandbox

    monkeypatch.setattr(sandbox, "SECONDS", 0.5)
    text = "{% set a = 'x' * 900000 %}{% for i in range(20000) %}{% set y = a.upper().lower() %}{% endfor %}"
    begun = time.thread_time()
    with pytest.raises(UserError, match="ran for more than 0.5 seconds"):
        chat.Template(text, {}).render(TALK)
    assert time.thread_time() - begun < 2


def test_long_conversations_are_within_bounds(ours):
    long = [{"role": role, "content": "word " * 2000} for _ in range(200) for role in ("user", "assistant")]
    for text in (CHATML, HEADERS, INST, BLOCKS):
        assert len(chat_of(ours, text).template.render(long)[0]) > 4_000_000


def conversations(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def chats(tmp_path):
    """Ten short conversations, each told from the others by its letter: (their folder, template for bytes)."""
    rows = []
    for letter in "abcdefghij":
        talk = [("user", letter * 3), ("assistant", letter.upper() * 5), ("user", "?"), ("assistant", letter.upper() + "!")]
        rows.append({"messages": [{"role": role, "content": content} for role, content in talk], "source": "ignored"})
    conversations(tmp_path / "one.jsonl", *rows[:6])
    conversations(tmp_path / "two.jsonl", *rows[6:])
    (tmp_path / "own.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}" + ASK)
    return tmp_path


ASK = "{% if add_generation_prompt %}a:{% endif %}"


def loader(folder, seq_len, rows=4, **part):
    source = {"kind": "chat", "path": f"{folder}/*.jsonl"}
    values = {"tokenizer": "bytes+bos", "chat_template": f"{folder}/own.jinja", "parts": {"chat": {"source": source, **part}}}
    return Loader(build(DataConfig, {**values, "heldout_fraction": 0.0}), seq_len, rows, seed=0)


METHODS = ["concat_then_split", "first_fit", "best_fit"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seq_len", [16, 200])
def test_targets_of_the_models_turns_have_weight(method, masked, seq_len, chats):
    """Through the real loader: exactly the upper-case letters, `!` and the `|` behind them are learned, once each an epoch."""
    given = loader(chats, seq_len, rows=1, packing={"method": method, "mask_documents": masked}, loss_weight=0.5)
    learned = []
    for step in range(given.parts[0].size):
        batch = given.batch(step)
        learned += batch.targets[batch.loss_weights > 0].tolist()
        assert set(np.unique(batch.loss_weights)) <= {0, 0.5}
        assert (batch.loss_weights[batch.segments == PADDING] == 0).all()
        # A target with weight is the token that stands next in the row, wherever the row goes on.
        inside = batch.loss_weights[0, :-1] > 0
        np.testing.assert_array_equal(batch.targets[0, :-1][inside], batch.tokens[0, 1:][inside])
    expected = "".join(f"{x * 5}|{x}!|" for x in "ABCDEFGHIJ").encode()
    # Across a cut of the row a target is still the document's next token, so nothing is lost.
    assert sorted(learned) == sorted(expected)


def test_one_conversation_in_a_row(chats):
    batch = loader(chats, 40, rows=10, packing={"method": "first_fit", "mask_documents": True}).batch(0)
    row = next(i for i in range(10) if b"aaa" in bytes((batch.tokens[i] % 256).astype(np.uint8)))
    text = "\0u:aaa|a:AAAAA|u:?|a:A!|"
    tokens = batch.tokens[row, : len(text)]
    assert tokens[0] == 256 and bytes(tokens[1:].tolist()).decode() == text[1:]
    learned = "".join(text[i + 1] if batch.loss_weights[row, i] else "." for i in range(len(text) - 1))
    assert learned == "........" + "AAAAA|" + "......" + "A!|"


def test_parts_of_text_and_tasks_beside_chats(chats):
    text = {"source": {"kind": "stdlib", "limit_bytes": 100_000}}
    task = {"kind": "key_value", "source": {"kind": "chat", "path": f"{chats}/*.jsonl"}, "task": {"needles": 2, "queries": 1}}
    own = {"source": {"kind": "chat", "path": f"{chats}/*.jsonl"}}
    values = {"tokenizer": "bytes+bos", "chat_template": f"{chats}/own.jinja", "parts": {"text": text, "task": task, "chat": own}}
    given = Loader(build(DataConfig, values), 96, 6, seed=0)
    batch, lines = given.batch(0), given.provenance(0)
    assert {line.split("[")[0] for line in lines} == {"text", "task", "chat"}
    for row, line in enumerate(lines):
        share = batch.loss_weights[row][batch.segments[row] != PADDING].astype(bool).mean()
        low, high = {"text": (0.9, 1.0), "task": (0.01, 0.99), "chat": (0.2, 0.6)}[line.split("[")[0]]
        assert low < share <= high, line


def test_inspect_counts_what_is_learned(chats):
    report = inspect(loader(chats, 64), rows=8)
    (part,) = report.parts
    assert part.source == f"chat:{chats}/*.jsonl"
    assert 0.2 < part.trained / part.tokens < 0.6
    assert any("u:" in sample and "one.jsonl:" in sample or "two.jsonl:" in sample for sample in part.samples)


def test_the_held_out_side_does_not_depend_on_template_or_tokenizer(chats):
    (chats / "other.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}")

    def held(tokenizer, template):
        source = {"kind": "chat", "path": f"{chats}/*.jsonl"}
        values = {"tokenizer": tokenizer, "chat_template": f"{chats}/{template}", "parts": {"chat": {"source": source}}}
        return Loader(build(DataConfig, {**values, "heldout_fraction": 0.3}), 64, 1, seed=0, split="heldout").parts[0].source.names

    assert held("bytes+bos", "own.jinja") == held("bytes", "other.jinja")


LINES = [
    ("{broken", "two.jsonl:2 is not valid JSON"),
    ('{"text": "x"}', "two.jsonl:2 has no messages under source.field='messages'"),
    ('{"messages": "hello"}', "two.jsonl:2: messages='hello' is not a conversation"),
    ('{"messages": []}', r"two.jsonl:2: messages=\[\] is not a conversation"),
    ('{"messages": [{"role": "user"}]}', "two.jsonl:2: messages.0. has content=None; expected a string"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', r"two.jsonl:2: messages\[0\] is the model's, .* start with another"),
    (
        '{"messages": [{"role": "user", "content": "x", "score": 1%s}]}' % ("0" * 100),
        "two.jsonl:2: .*a number of more than 256 bits",
    ),
    ('{"messages": [{"content": "x"}]}', r"two.jsonl:2: messages\[0\] has role=None"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "two.jsonl:2 has nothing for the model to write"),
]


@pytest.mark.parametrize(("line", "message"), LINES)
def test_wrong_lines_are_named(line, message, chats):
    with open(chats / "two.jsonl", "w") as file:
        file.write('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        loader(chats, 64)


def test_wrong_configs(chats):
    with pytest.raises(UserError, match="source.append_eos=True cannot be combined with source.kind='chat'"):
        loader(chats, 64, source={"kind": "chat", "path": "x", "append_eos": True})
    values = {"parts": {"chat": {"source": {"kind": "chat", "path": f"{chats}/*.jsonl"}}}}
    with pytest.raises(UserError, match="tokenizer 'bytes' has no chat template; name a template file with data.chat_template"):
        Loader(build(DataConfig, values), 64, 1, seed=0)
