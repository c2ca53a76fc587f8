"""Synthetic documents by a real HTTP server and by a tiny model on this machine, through the command."""

import collections
import json
import random
import re

import pytest

from lcx.cli.main import main
from lcx.core.errors import UserError
from lcx.data.curation.synthesize.settings import EndpointGenerator, GeneratorConfig, LocalGenerator
from lcx.data.tokenizers import tokenizers
from lcx.recipes.synthesis import LocalWriter, generator
from tests import model_server
from tests.recipes import tiny_reader
from tests.report.html_page import Page

CONFIG = """
from lcx.data.curation.config import curated, defaults

def get_config():
    new = {{"method": "rephrase", "rephrase": {{"passage_chars": 200, "style": "textbook"}}}}
    asked = {{"method": "questions", "questions": {{"spans": 2, "span_chars": 120}}}}
    values = {{"synthesize": {{"new": new, "asked": asked}}, "generator": {generator}}}
    return defaults(values, texts=curated("long", source={{"kind": "text", "path": "{folder}/*.txt"}}, filters=()))
"""


class Server(model_server.Server):
    """A model that writes a passage backwards, or asks about the first words; the first requests meet with a trouble each."""

    def __init__(self):
        self.asked, self.troubles, self.usage = [], [], True
        server = self

        class Handler(model_server.Handler):
            def do_POST(self):
                body = self.body()
                server.asked.append(body)
                trouble = server.troubles.pop(0) if server.troubles else None
                if trouble == "page":
                    return self.reply(200, b"<html>Welcome</html>", "text/html")
                if trouble == "empty":
                    return self.reply(200, b"{}")
                text = body["messages"][-1]["content"]
                passages = re.findall(r"Passage(?: \d+)?:\n(.*?)(?=\n\nPassage|\Z)", text, re.S)
                content = " ".join(reversed(passages[0].split()))
                if text.startswith("Below"):
                    content = json.dumps({"question": "How does it begin, and go on?", "answer": passages[0].split()[0]})
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
                counts = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
                self.reply(trouble or 200, {"choices": [choice], **({"usage": counts} if server.usage else {})})

        super().__init__(Handler)


@pytest.fixture
def server():
    pytest.importorskip("openai", reason="the extra eval")
    with Server() as found:
        yield found


@pytest.fixture
def texts(tmp_path):
    rng = random.Random(0)
    words = [f"{word}{end}" for word in ("river", "bank", "water", "boat", "mill") for end in ("", "s", "side", "man", "house")]
    for i in range(3):
        text = "\n\n".join(" ".join(rng.choice(words) for _ in range(24)) + "." for _ in range(8 + i))
        (tmp_path / f"{i}.txt").write_text(text)
    return tmp_path


def curate(folder, generator, *flags, out="out"):
    (folder / "config.py").write_text(CONFIG.format(generator=generator, folder=folder))
    main(["data", "curate", f"--config={folder}/config.py", f"--out={folder}/{out}", "--workers=1", *flags])


def test_an_endpoint_writes_and_is_asked_once(texts, server, capsys):
    model = {"endpoint": {"url": server.url, "model": "writer"}, "price_per_million_input": 1.0, "price_per_million_output": 5.0}
    curate(texts, model, "--dry_run")
    said = capsys.readouterr().out
    wanted = int(re.search(r"new: (\d+) requests about 3 documents to writer at http", said)[1])
    assert (
        not server.asked
        and "asked: 3 requests about 3 documents" in said
        and re.search(r"cost: about \S+ for the requests, at most", said)
    )
    server.troubles += [500, 429]
    curate(texts, model)
    said = capsys.readouterr().out
    assert len(server.asked) == wanted + 3 + 2 and all(one["temperature"] == 0 and "seed" not in one for one in server.asked)
    assert f"{wanted} requests to writer: {wanted * 100:,} tokens in, {wanted * 10} out; cost {wanted * 150 / 1e6:,.4g}" in said
    assert f"'kind': 'chat', 'path': '{texts}/out/asked/*.jsonl'" in said and f"--path='{texts}/out/new/*.jsonl'" in said
    assert "/out/asked/*.jsonl' --tokenizer" not in said
    report = json.loads((texts / "out" / "report.json").read_text())["synthesized"]
    assert report["new"]["answers"] == {"used": wanted} and report["new"]["tokens"]["estimated_requests"] == 0
    page = Page((texts / "out" / "report.html").read_text()).sections["Synthetic documents"]
    (first, second) = page.tables[0][1:]
    assert first[0] == "asked questions of texts, by writer" and first[4:7] == ["3", "100.0%", "300 → 30"]
    assert second[0] == "new rephrase of texts, by writer" and second[7] == f"{wanted * 150 / 1e6:,.4g}"
    assert page.summaries[1].startswith(f"new answers: used {wanted}") and "How does it begin" in page.text
    curate(texts, model)
    assert len(server.asked) == wanted + 5


def test_tokens_that_a_server_does_not_count_are_estimated(texts, server, capsys):
    server.usage = False
    curate(texts, {"endpoint": {"url": server.url, "model": "writer"}})
    said = capsys.readouterr().out
    assert re.search(r"out \(\d+ requests estimated\); cost not known, as generator.price_per_million", said)
    of = json.loads((texts / "out" / "report.json").read_text())["synthesized"]["asked"]
    sent = sum(
        -(-len(one["messages"][0]["content"].encode()) // 4) for one in server.asked if "Below" in one["messages"][0]["content"]
    )
    assert of["tokens"]["input"] == sent and of["tokens"]["estimated_requests"] == 3


def test_what_is_drawn_has_a_seed_of_its_own(server):
    config = GeneratorConfig(EndpointGenerator(server.url, "writer", 1), temperature=0.7, stop=("###",), max_tokens=9)
    list(generator(config)(["Passage:\na b", "Passage:\nc d", "Passage:\na b"]))
    by_text = collections.defaultdict(set)
    for one in server.asked:
        assert (one["temperature"], one["stop"], one["max_tokens"]) == (0.7, ["###"], 9)
        by_text[one["messages"][0]["content"]].add(one["seed"])
    assert [len(seeds) for seeds in by_text.values()] == [1, 1] and len(set.union(*by_text.values())) == 2


@pytest.mark.parametrize(
    ("troubles", "message"),
    [
        ([500, 500], "answered 500"),
        ([401], "set OPENAI_API_KEY to a key that the server accepts"),
        (["page"], "does not answer as OpenAI's protocol says"),
        (["empty"], "does not answer as OpenAI's protocol says"),
    ],
)
def test_a_server_that_fails_is_one_sentence_and_loses_nothing(texts, server, capsys, troubles, message):
    model = {"endpoint": {"url": server.url, "model": "writer", "retries": 1, "concurrency": 1}}
    server.troubles += [200, 200, *troubles]
    with pytest.raises(SystemExit) as left:
        curate(texts, model)
    said = capsys.readouterr().err.strip()
    assert left.value.code == 1 and said.startswith("error: ") and message in said and "\n" not in said
    assert len((texts / "out" / "generated.jsonl").read_text().splitlines()) == 2
    before = [json.dumps(one["messages"]) for one in server.asked[:2]]
    curate(texts, model)
    after = [json.dumps(one["messages"]) for one in server.asked[2 + len(troubles) :]]
    assert not set(before) & set(after) and (texts / "out" / "report.json").exists()


def local(seed=0, **values):
    """A tiny random model, whose answers end at one of a few letters."""
    options = {"max_tokens": 40, "stop": ("e", "t", "a", "o", "n"), **values}
    config = GeneratorConfig(local=LocalGenerator("tiny", tokens_per_forward=1024), **options)
    return LocalWriter(config, config.local, tiny_reader.reader(seed).loaded)


def answers(model, requests):
    found = {}
    for some in model(requests):
        found |= some
    return [found[i] for i in range(len(requests))]


@pytest.mark.slow
def test_a_local_model_answers_as_it_does_alone():
    requests = [f"Passage:\n{word} {i}" for i, word in enumerate(("river", "bank", "a long boat", "mill", "bridge", "stone"))]
    model = local()
    assert model.batch_size == 4 and model.fingerprint == local().fingerprint != local(1).fingerprint
    found = answers(model, requests)
    assert answers(local(), requests) == found
    # The second batch by itself, as after a kill, has the same shape and so the same answers.
    assert answers(local(), requests[4:]) == found[4:]
    assert {answer.ended for answer in found} <= {"stop", "length"} and all(answer.output_tokens <= 40 for answer in found)
    bytes_ = tokenizers.load("bytes")
    assert [answer.input_tokens for answer in found] == [len(bytes_.encode(request + "\n\n")) for request in requests]


def test_a_request_that_is_too_long_disturbs_no_other():
    model = local()
    first, long, last = answers(model, ["Passage:\nriver", "x" * 220, "Passage:\nbank"])
    assert long.fault == "request_too_long" and long.text == ""
    assert [first.text, last.text] == [answer.text for answer in answers(local(), ["Passage:\nriver", "Passage:\nbank"])]


@pytest.mark.slow
def test_drawn_answers_depend_on_the_request_alone():
    requests = ["Passage:\nriver", "Passage:\nbank", "Passage:\nriver!"]
    found = answers(local(temperature=1.0, stop=()), requests)
    again = answers(local(temperature=1.0, stop=()), requests[::-1])[::-1]
    assert found == again and len({answer.text for answer in found}) == 3 and found[0].ended == "length"
    assert local(temperature=1.0).batch_size == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 256}, "generator.max_tokens=256 leaves no room for a request in the 256 tokens of tiny; lower it"),
        ({"local": LocalGenerator("tiny", length=999)}, "generator.local.length=999 exceeds the 256 tokens of tiny; lower it"),
    ],
)
def test_a_local_model_has_room(values, message):
    config = GeneratorConfig(**{"local": LocalGenerator("tiny"), "max_tokens": 9, **values})
    with pytest.raises(UserError, match=message):
        LocalWriter(config, config.local, tiny_reader.reader().loaded)


def test_what_is_no_model_is_one_sentence(texts, capsys):
    with pytest.raises(SystemExit):
        curate(texts, {"local": {"model": f"{texts}/nothing"}})
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and f"{texts}/nothing" in said and "\n" not in said
