"""Synthesis: passages and spans by hand, what is read of answers, and the stage in a curation with a model made of rules."""

import collections
import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from lcx.core import configs
from lcx.core.errors import UserError
from lcx.data.config import SourceConfig
from lcx.data.curation.answers import Answers
from lcx.data.curation.assemble.settings import AssembleConfig
from lcx.data.curation.config import CuratedSource, CurationConfig, curated, defaults
from lcx.data.curation.pipeline import curate
from lcx.data.curation.synthesize import stage
from lcx.data.curation.synthesize.generator import Answer
from lcx.data.curation.synthesize.methods import Rephrase, Spans, Unusable, copied, parse
from lcx.data.curation.synthesize.passages import cut, far_apart
from lcx.data.curation.synthesize.prompts import STYLES
from lcx.data.curation.synthesize.settings import (
    EndpointGenerator,
    GeneratorConfig,
    RephraseSettings,
    SpanSettings,
    SynthesizeConfig,
    TaskSettings,
    identity,
)
from lcx.data.sources import sources
from lcx.data.synthetic.questions import QuestionsConfig
from lcx.data.tasks.base import TaskConfig
from lcx.data.tokenizers.tokenizers import Bytes

WORDS = ["river", "stone", "harbour", "winter", "letter", "window", "garden", "silver", "mountain", "paper"]


def prose(seed, paragraphs):
    """Paragraphs of a few sentences, no two of which are alike."""
    rng = random.Random(seed)
    sentence = lambda: " ".join(rng.choice(WORDS) for _ in range(8)).capitalize() + f" {rng.randrange(10**6)}."  # noqa: E731
    return "\n\n".join(" ".join(sentence() for _ in range(4)) for _ in range(paragraphs))


def test_passages_are_the_text_and_end_where_it_may_be_cut():
    text = prose(0, 30)
    places = cut(text, 700)
    assert "".join(text[start:end] for start, end in places) == text
    sizes = [end - start for start, end in places]
    assert max(sizes) <= 700 and min(sizes) >= 250
    assert all(text[:end].endswith("\n\n") for _, end in places[:-1])
    assert cut("", 5) == [] and cut("abc", 5) == [(0, 3)]
    assert [b - a for a, b in cut("x" * 10, 4)] == [4, 3, 3]
    sentences = "One two. Three four! " * 9
    assert all(sentences[:end].rstrip().endswith((".", "!")) for _, end in cut(sentences, 50))


def test_choices_of_far_spans_are_equally_likely_and_far():
    starts, ends, count, distance = [0, 10, 20, 35, 50, 60], [8, 18, 30, 45, 58, 70], 3, 10
    allowed = [
        chosen
        for chosen in itertools.combinations(range(6), count)
        if all(starts[b] - ends[a] >= distance for a, b in itertools.pairwise(chosen))
    ]
    rng = random.Random(0)
    drawn = collections.Counter(tuple(far_apart(rng, starts, ends, count, distance)) for _ in range(6000))
    assert set(drawn) == set(allowed) and len(allowed) > 2
    assert all(abs(n / 6000 - 1 / len(allowed)) < 0.03 for n in drawn.values())
    assert far_apart(rng, starts, ends, 5, distance) is None and far_apart(rng, [], [], 1, 0) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"question": "Who?", "answer": "Ann"}', ("Who?", "Ann")),
        ('Sure!\n```json\n{"question": " Who? ",\n "answer": "Ann\nand Bo"}\n```', ("Who?", "Ann\nand Bo")),
        ('{oops} {"Question": "How many?", "Answer": 3}', ("How many?", "3")),
        ("Question: Who came?\nAnswer: Ann.", ("Who came?", "Ann.")),
        ("**Question:** Who came?\n\n**Answer:** Ann.\nAnd Bo.", ("Who came?", "Ann.\nAnd Bo.")),
        ('{"question": "", "answer": "x"}', ("", "x")),
        ('{"question": "Who?"}', None),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_questions_that_are_understood(text, found):
    assert parse(text) == found


def test_copies_by_hand():
    assert copied("a b c d e f", "x a b c d e y f") == 0.5
    assert copied("One, two; three", "zero one two three") == 1.0 and copied("one three", "one two three") == 0.0
    assert copied("...", "...") == 1.0 and copied("...", "!") == 0.0


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(""), "empty"),
        (Answer(" \n"), "empty"),
        (Answer("<think>hm</think>\n"), "empty"),
        (Answer("x" * 50, "length"), "cut_off"),
        (Answer("", "too_long"), "request_too_long"),
        (Answer("x" * 50, "content_filter"), "refused"),
        (Answer("I'm sorry, but I can't do this."), "refused"),
        (Answer("I cannot rewrite it."), "refused"),
        (Answer("Sorry to hear of the river."), None),
        (Answer("I cannot say that the river was calm."), None),
    ],
)
def test_answers_that_no_method_can_use(answer, reason):
    assert answer.fault == reason


def test_rewritten_passages_that_are_not_used():
    passage = "The old harbour lay still, and no ship had come in since the winter."
    method = Rephrase(RephraseSettings())
    draft = method.draft("a", "one", f"\n{passage}\n")
    assert draft.places == (((1, 1 + len(passage)),),) and draft.requests[0].endswith(f"Passage:\n{passage}")
    good = "No ship had entered the quiet harbour of old times since winter came."
    assert method.read(draft, 0, Answer(f"Here is the rewritten passage:\n\n{good}")) == good
    assert method.read(draft, 0, Answer(f"<think>\nships?</think>\n{good}\n")) == good
    for said, reason in ((passage.upper(), "copy"), (good[:20], "too_short"), (3 * good, "too_long")):
        with pytest.raises(Unusable, match=reason):
            method.read(draft, 0, Answer(said))
    with pytest.raises(Unusable, match="blank"):
        method.draft("a", "one", " \n ")


def test_prompts_of_ones_own():
    """Braces in a text or a prompt stay as they are."""
    method = Rephrase(RephraseSettings(prompt='As {json}: "{text}"'))
    assert method.draft("a", "one", "int main() { {text} }").requests == ('As {json}: "int main() { {text} }"',)
    method = Spans(SpanSettings(spans=1, prompt="Ask in {x} about\n{passages}\n!"), 0)
    assert method.draft("a", "one", "{a} text").requests == ("Ask in {x} about\nPassage 1:\n{a} text\n!",)
    styles = {Rephrase(RephraseSettings(style)).draft("a", "one", "text").requests for style in STYLES}
    assert len(styles) == len(STYLES) > 3


def test_questions_that_are_not_used():
    method = Spans(SpanSettings(spans=2, span_chars=300), 0)
    draft = method.draft("a", "one", prose(1, 12))
    assert "Below are 2 passages" in draft.requests[0] and "Passage 2:\n" in draft.requests[0]
    for said, reason in (
        ("no", "unparsed"),
        ('{"question": "", "answer": "x"}', "no_question"),
        ('{"question": "Who?", "answer": ""}', "no_answer"),
        ('{"question": "Did Ann Lee come?", "answer": "Ann Lee."}', "quotes_its_answer"),
        ('{"question": "What does passage 2 say of her?", "answer": "x"}', "speaks_of_passages"),
    ):
        with pytest.raises(Unusable, match=reason):
            method.read(draft, 0, Answer(said))
    assert method.read(draft, 0, Answer('{"question": "Did Annabel come?", "answer": "Ann"}'))["answer"] == "Ann"


@pytest.mark.parametrize("unit", ["share", "tokens"])
def test_spans_of_a_question_are_far_apart_in_the_document(unit):
    far = {"min_distance": 0.25} if unit == "share" else {"min_distance": 1500, "unit": "tokens", "tokenizer": "bytes"}
    method = Spans(SpanSettings(spans=3, span_chars=400, per_document=4, **far), 0)
    seen = set()
    for seed in range(20):
        draft = method.draft("a", f"d{seed}", prose(seed, 30))
        assert draft == method.draft("a", f"d{seed}", prose(seed, 30))
        assert 1 < len(draft.requests) <= 4 and len(set(draft.places)) == len(draft.places)
        for request, places in zip(draft.requests, draft.places, strict=True):
            least = 0.25 * len(draft.text) if unit == "share" else 1500
            assert len(places) == 3 and all(b[0] - a[1] >= least - 1e-6 for a, b in itertools.pairwise(places))
            assert all(f"Passage {i}:\n{draft.text[a:b]}" in request for i, (a, b) in enumerate(places, 1))
            seen.add(places[0][0])
    assert len(seen) > 5
    with pytest.raises(Unusable, match="too_short"):
        method.draft("a", "short", prose(0, 1))


class Model:
    """Rewrites a passage word by word backwards, or asks about the first word of each passage; knows what it was asked."""

    def __init__(self, faults=(), batch_size=1, killed_after=None):
        self.asked, self.configs, self.faults = [], [], dict(faults)
        self.batch_size, self.fingerprint, self._killed_after = batch_size, "rules", killed_after

    def __call__(self, config):
        self.configs.append(config)
        return _Asked(self)

    def answer(self, request):
        number = len(self.asked)
        self.asked.append(request)
        if number == self._killed_after:
            raise KeyboardInterrupt
        if number in self.faults:
            return self.faults[number]
        passages = re.findall(r"Passage(?: \d+)?:\n(.*?)(?=\n\nPassage|\Z)", request, re.S)
        if request.startswith("Below"):
            first = [passage.split()[0] for passage in passages]
            said = json.dumps({"question": f"Which {len(first)} words begin {len(request)}?", "answer": " ".join(first)})
        else:
            said = " ".join(reversed(passages[0].split()))
        return Answer(said, "stop", len(request.split()), len(said.split()))


class _Asked:
    def __init__(self, model):
        self._model, self.fingerprint, self.batch_size = model, model.fingerprint, model.batch_size

    def __call__(self, requests):
        for number in reversed(range(len(requests))):
            yield {number: self._model.answer(requests[number])}


PRICED = GeneratorConfig(EndpointGenerator("http://nowhere/v1", "m"), price_per_million_input=2.0, price_per_million_output=10.0)
REPHRASE = SynthesizeConfig(documents=4, rephrase=RephraseSettings(passage_chars=500))
QUESTIONS = SynthesizeConfig("questions", documents=5, questions=SpanSettings(span_chars=300, per_document=2, question_first=0.5))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(8):
        (folder / f"long{i}.txt").write_text(prose(i, 12 + i) + "\n")
    (folder / "short.txt").write_text(prose(99, 1) + "\n")
    return folder


@pytest.fixture(autouse=True)
def inside(texts, monkeypatch):
    """Documents are drawn by their names, which are to be the same in every run."""
    monkeypatch.chdir(texts)


def config_of(generator=PRICED, **synthesized):
    source = CuratedSource(filters=(), source=SourceConfig("text", "*.txt"))
    return CurationConfig({"a": source}, minhash=None, shard_bytes=9_000, synthesize=synthesized, generator=generator)


def rows(folder, name):
    return [json.loads(line) for path in sorted((folder / name).glob("*.jsonl")) for line in path.read_bytes().splitlines()]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_document_is_rewritten_passage_by_passage(tmp_path):
    # Answers come last first, so the third to come is that to the last but two of all requests.
    faults = {2: Answer("cut", "length"), 5: Answer("")}
    model = Model(faults)
    report = curate(config_of(new=REPHRASE), tmp_path / "out", generator=model)["synthesized"]["new"]
    originals = {row["name"]: row["text"].encode() for row in rows(tmp_path / "out", "a")}
    found = rows(tmp_path / "out", "new")
    assert len(found) == 4 == report["out"]["documents"] and [row["name"] for row in found] == [f"new:{i}" for i in range(4)]
    kept = []
    for row in found:
        text, original = row["text"].encode(), originals[row["document"]["name"]]
        assert row["document"]["source"] == "a" and row["bytes"] == len(text)
        new = old = 0
        for passage in row["passages"]:
            before, after = original[passage["from"] : passage["to"]], text[passage["start"] : passage["end"]]
            # What lies between passages is white space, and stays.
            assert text[new : passage["start"]] == original[old : passage["from"]] and not original[old : passage["from"]].strip()
            if "kept" in passage:
                assert before == after
                kept.append(passage["kept"])
            else:
                assert after.split() == before.split()[::-1]
            new, old = passage["end"], passage["to"]
        assert text[new:] == original[old:] == b"\n"
    assert sorted(kept) == ["cut_off", "empty"] and report["out"]["bytes"] == sum(row["bytes"] for row in found)
    assert report["answers"] == {"used": report["requests"] - 2, "cut_off": 1, "empty": 1}
    assert report["left_over"]["not_drawn"]["documents"] == 5 and report["in"]["documents"] == 9
    assert report["requests"] == len(model.asked) == len(set(model.asked)) > 8


def test_tokens_and_cost_are_those_of_all_requests(tmp_path):
    model = Model({0: Answer("x" * 100)})
    of = curate(config_of(new=REPHRASE), tmp_path / "out", generator=model)["synthesized"]["new"]
    sent = sum(len(request.split()) for request in model.asked[1:]) + -(-len(model.asked[0].encode()) // 4)
    assert of["tokens"]["input"] == sent and of["tokens"]["estimated_requests"] == 1
    assert of["cost"] == pytest.approx((2 * of["tokens"]["input"] + 10 * of["tokens"]["output"]) / 1e6)
    free = GeneratorConfig(EndpointGenerator("http://nowhere/v1", "m"))
    assert curate(config_of(free, new=REPHRASE), tmp_path / "free", generator=Model())["synthesized"]["new"]["cost"] is None


def test_a_document_may_be_dropped_for_one_passage(tmp_path):
    rephrase = RephraseSettings(passage_chars=500, failed="drop")
    config = config_of(new=SynthesizeConfig(documents=4, rephrase=rephrase))
    of = curate(config, tmp_path / "out", generator=Model({0: Answer("")}))["synthesized"]["new"]
    assert of["out"]["documents"] == 3 and of["left_over"]["a_passage_failed"]["documents"] == 1
    whole = config_of(new=SynthesizeConfig(documents=1, max_failed=1.0))
    of = curate(whole, tmp_path / "none", generator=Model({i: Answer("") for i in range(99)}))["synthesized"]["new"]
    assert of["out"]["documents"] == 0 and of["left_over"]["nothing_rewritten"]["documents"] == 1


def test_a_chat_has_loss_on_the_answers_alone(tmp_path):
    report = curate(config_of(asked=QUESTIONS), tmp_path / "out", generator=Model())["synthesized"]["asked"]
    originals = {row["name"]: row["text"] for row in rows(tmp_path / "out", "a")}
    found = rows(tmp_path / "out", "asked")
    assert len(found) == 5 and report["left_over"]["not_drawn"]["documents"] >= 3
    assert {row["order"] for row in found} == {"question_first", "document_first"}
    for row in found:
        text = originals[row["document"]["name"]]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * len(row["spans"])
        for i, spans in enumerate(row["spans"]):
            pieces = [text.encode()[a:b].decode() for a, b in spans]
            assert row["messages"][2 * i + 1]["content"] == " ".join(piece.split()[0] for piece in pieces)
            assert all(b[0] - a[1] >= 0.2 * len(text) for a, b in itertools.pairwise(spans))
        first = row["messages"][0]["content"]
        assert first.startswith(f"{text}\n\nWhich") if row["order"] == "document_first" else first.endswith(f"\n\n{text}")
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>\n{% endfor %}")
    chats = sources.load(SourceConfig("chat", f"{tmp_path}/out/asked/*.jsonl"), Bytes(), f"{tmp_path}/chat.jinja")
    for i, row in enumerate(found):
        span = np.array([i]), np.array([0]), chats.lengths[[i]]
        tokens, weights = chats.gather(*span), chats.loss_weights(*span)
        runs = itertools.groupby(zip(tokens.tolist(), weights.tolist(), strict=True), lambda one: one[1] > 0)
        said = "".join(bytes(token for token, _ in run).decode() for has_loss, run in runs if has_loss)
        answers = [message["content"] for message in row["messages"][1::2]]
        assert re.findall(r"(.*?)<end>", said.replace("[assistant]", "")) == answers and set(weights) == {0, 1}


def test_nothing_is_asked_twice_and_another_folder_may_share_the_answers(tmp_path):
    cached = GeneratorConfig(PRICED.endpoint, cache=str(tmp_path / "kept.jsonl"))
    first, again = Model(), Model()
    curate(config_of(cached, new=REPHRASE, asked=QUESTIONS), tmp_path / "one", generator=first)
    before = (tmp_path / "kept.jsonl").read_bytes()
    curate(config_of(cached, new=REPHRASE, asked=QUESTIONS), tmp_path / "two", generator=again)
    assert first.asked and not again.asked and (tmp_path / "kept.jsonl").read_bytes() == before
    assert rows(tmp_path / "one", "new") == rows(tmp_path / "two", "new")
    # Another setting is another answer.
    curate(config_of(cached, new=SynthesizeConfig(documents=4)), tmp_path / "three", generator=again)
    assert again.asked


@pytest.mark.parametrize("batch_size", [1, 3])
def test_killed_anywhere_it_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch, batch_size):
    monkeypatch.setattr(stage, "WINDOW", 8)
    config = config_of(new=REPHRASE, asked=QUESTIONS)
    whole = Model(batch_size=batch_size)
    report = curate(config, tmp_path / "whole", generator=whole)
    killed, asked = [], []
    for at in (0, 5, 4, 9):
        killed.append(Model(batch_size=batch_size, killed_after=at))
        with pytest.raises(KeyboardInterrupt):
            curate(config, tmp_path / "out", generator=killed[-1])
        asked += killed[-1].asked[:-1]
        (tmp_path / "out" / "generated.jsonl").open("a").write('{"key": "torn')
    last = Model(batch_size=batch_size)
    assert curate(config, tmp_path / "out", workers=2, generator=last) == report
    asked += last.asked
    assert set(asked) == set(whole.asked) and len(asked) <= len(whole.asked) + 4 * (batch_size - 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_dry_run_counts_and_asks_nothing(tmp_path):
    config, model = config_of(new=REPHRASE, asked=QUESTIONS), Model()
    found = curate(config, tmp_path / "out", generator=model, dry_run=True)["requests"]
    assert not model.asked and not (tmp_path / "out" / "report.json").exists()
    notes = []
    report = curate(config, tmp_path / "out", generator=model, report=lambda progress: notes.append(progress.note))["synthesized"]
    assert {name: of["requests"] for name, of in found.items()} == {name: of["requests"] for name, of in report.items()}
    assert f"{found['new']['requests']} requests about 4 documents to m at http://nowhere/v1, about" in "".join(notes)
    assert "synthesized" in curate(config, tmp_path / "out", generator=model, dry_run=True)


def test_settings_may_change_until_all_is_written(tmp_path):
    """After a dry run, or an error, only what is synthesised is made anew."""
    curate(config_of(new=REPHRASE), tmp_path / "out", generator=Model(), dry_run=True)
    judged = (tmp_path / "out" / "work" / "a" / "00000.json").stat().st_mtime_ns
    (tmp_path / "out" / "work" / ".synthesize.json").write_text('["old"]')
    (tmp_path / "out" / "old").mkdir()
    curate(config_of(asked=QUESTIONS), tmp_path / "out", generator=Model(), dry_run=True)
    assert (tmp_path / "out" / "work" / "a" / "00000.json").stat().st_mtime_ns == judged
    report = curate(config_of(asked=QUESTIONS), tmp_path / "out", generator=Model())
    assert curate(config_of(asked=QUESTIONS), tmp_path / "whole", generator=Model()) == report
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and not (tmp_path / "out" / "old").exists()
    with pytest.raises(UserError, match=r"holds another curation \(config.synthesize.new is None"):
        curate(config_of(new=REPHRASE), tmp_path / "out", generator=Model())


def test_nonsense_ends_the_run_early_and_can_be_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "WINDOW", 6)
    nonsense = Model({i: Answer("No idea.") for i in range(99)})
    message = (
        r"m at http://nowhere/v1 gave no answer of use to 6 of 6 requests of config.synthesize.asked \(unparsed 6\), but "
        r"'No idea.'; change the model or the prompt, or raise max_failed=0.5; its answers are kept in .*generated.jsonl"
    )
    with pytest.raises(UserError, match=message):
        curate(config_of(asked=QUESTIONS), tmp_path / "out", generator=nonsense)
    assert len(nonsense.asked) == 6 == len((tmp_path / "out" / "generated.jsonl").read_bytes().splitlines())
    more = SynthesizeConfig("questions", documents=5, max_failed=1.0, questions=QUESTIONS.questions)
    model = Model()
    of = curate(config_of(asked=more), tmp_path / "out", generator=model)["synthesized"]["asked"]
    assert of["answers"]["unparsed"] == 6 and not set(model.asked) & set(nonsense.asked)


def test_a_model_that_fails_loses_nothing(tmp_path):
    class Down(Model):
        def answer(self, request):
            if len(self.asked) == 3:
                raise UserError("http://nowhere/v1 cannot be reached; is the server running?")
            return super().answer(request)

    down, up = Down(), Model()
    with pytest.raises(UserError, match="cannot be reached"):
        curate(config_of(new=REPHRASE), tmp_path / "out", generator=down)
    moved = GeneratorConfig(
        EndpointGenerator("http://elsewhere/v1", "m", retries=1), price_per_million_input=2.0, price_per_million_output=10.0
    )
    curate(config_of(moved, new=REPHRASE), tmp_path / "out", generator=up)
    assert len(down.asked) == 3 and not set(up.asked) & set(down.asked)
    with pytest.raises(UserError, match="config.generator needs a caller that knows models; lcx data curate does"):
        curate(config_of(new=REPHRASE), tmp_path / "none")


def test_sources_may_be_assembled_ones(tmp_path):
    source = CuratedSource(filters=(), source=SourceConfig("text", "*.txt"))
    config = CurationConfig(
        {"a": source},
        minhash=None,
        assemble={"long": AssembleConfig(target=20_000)},
        synthesize={"asked": SynthesizeConfig("questions", ("long",), questions=SpanSettings(spans=4))},
        generator=PRICED,
    )
    curate(config, tmp_path / "out", generator=Model())
    found = rows(tmp_path / "out", "asked")
    assert found and all(row["document"]["source"] == "long" and row["bytes"] >= 20_000 for row in found)


def test_answers_survive_separators_and_torn_lines(tmp_path):
    path = tmp_path / "answers.jsonl"
    kept = Answers(path)
    with kept.open():
        kept.add("b", "one\u2028two\x85three")
        kept.add("a", {"text": "x"})
    with path.open("ab") as file:
        file.write('{"key": "c", "answer": "é'.encode()[:-1])
    again = Answers(path)
    assert again.known == {"b": "one\u2028two\x85three", "a": {"text": "x"}}
    with again.open():
        again.add("c", "é")
    again.rewrite()
    assert Answers(path).known == again.known and [line[:11] for line in path.read_bytes().split(b"\n")[:3]] == [
        b'{"key": "a"', b'{"key": "b"', b'{"key": "c"',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"), [('{"text": "a"}\n', "holds something else than answers; name another"), (None, "cannot be kept in")]
)
def test_a_cache_that_is_none(tmp_path, content, message):
    path = tmp_path / "kept.jsonl"
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    kept = GeneratorConfig(PRICED.endpoint, cache=str(path))
    with pytest.raises(UserError, match=message):
        curate(config_of(kept, new=REPHRASE), tmp_path / "out", generator=Model())


@pytest.mark.parametrize("form", ["chat", "text"])
def test_generated_tasks_as_documents(tmp_path, form):
    questions = QuestionsConfig(skills=("retrieval", "lookup", "tracking"), questions=2)
    config = config_of(
        None,
        words=SynthesizeConfig("task", documents=6, task=TaskSettings(length=2000, form=form, questions=questions)),
        needles=SynthesizeConfig(
            "task", documents=3, seed=1, task=TaskSettings("multikey", 1000, form=form, retrieval=TaskConfig(queries=2))
        ),
    )
    report = curate(config, tmp_path / "out")["synthesized"]
    assert (
        report["words"]["out"]["documents"] == 6 and report["needles"]["task"] == "multikey" and "requests" not in report["words"]
    )
    words, needles = (rows(tmp_path / "out", name) for name in ("words", "needles"))
    assert len({json.dumps(row) for row in words}) == 6 and {row["task"] for row in words} <= {"retrieval", "lookup", "tracking"}
    for row, pairs in [*((row, 2) for row in words), *((row, 2) for row in needles)]:
        if form == "text":
            text = row["text"].encode()
            answers = [text[a:b].decode().strip() for a, b in row["answers"]]
            assert len(answers) == pairs and row["bytes"] == len(text) <= row["tokens"]
            before = [text[:a].decode() for a, _ in row["answers"]]
        else:
            assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * pairs
            answers = [message["content"] for message in row["messages"][1::2]]
            before = [row["messages"][0]["content"]] * pairs
        assert all(answers)
        if row["task"] == "multikey":
            assert all(re.fullmatch(r"\d{4}", answer) and answer in text for answer, text in zip(answers, before, strict=True))
    assert (tmp_path / "out" / "words" / "00000.jsonl").exists()
    curate(config, tmp_path / "again", workers=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_a_task_that_does_not_fit(tmp_path):
    with pytest.raises(
        UserError, match="config.synthesize.rows: the haystack has .* tokens, but a row needs 1000001; use a larger"
    ):
        curate(config_of(None, rows=SynthesizeConfig("task", task=TaskSettings(length=10**6))), tmp_path / "out")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    config = CurationConfig(
        {"a": CuratedSource(filters=(), source=SourceConfig("text", f"{tmp_path}/bad.txt"))},
        synthesize={"rows": SynthesizeConfig("task"), "new": SynthesizeConfig()},
        generator=PRICED,
    )
    with pytest.raises(UserError, match="config.synthesize.rows has no text to make rows of: no document of a was kept"):
        curate(config, tmp_path / "none", generator=Model())


def test_what_a_rerun_may_change():
    base = config_of(new=REPHRASE)
    same = GeneratorConfig(
        EndpointGenerator("https://other/v1", "m", 9, 1.0, 0), cache="x", price_per_million_input=2.0, price_per_million_output=10.0
    )
    lenient = SynthesizeConfig(documents=4, max_failed=0.9, rephrase=RephraseSettings(passage_chars=500))
    assert identity(base.synthesize, base.generator) == identity({"new": lenient}, same)
    hotter = GeneratorConfig(PRICED.endpoint, temperature=1.0)
    assert identity(base.synthesize, base.generator) != identity(base.synthesize, hotter)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SynthesizeConfig("rephrse"), "method='rephrse' is unknown; did you mean 'rephrase'"),
        (lambda: SynthesizeConfig(documents=0), "synthesize.documents=0 must be above 0"),
        (lambda: SynthesizeConfig(max_failed=1.5), "synthesize.max_failed=1.5 must be a share from 0 to 1"),
        (lambda: SynthesizeConfig(sources=("a", "a")), "names a source twice"),
        (lambda: SynthesizeConfig(questions=SpanSettings(2)), "synthesize.questions has no effect with method='rephrase'"),
        (lambda: RephraseSettings("poem"), "rephrase.style='poem' is unknown; allowed: dialogue, encyclopaedic, plain, textbook"),
        (
            lambda: RephraseSettings(prompt="Rewrite."),
            "rephrase.prompt='Rewrite.' does not say where the passage stands; put {text}",
        ),
        (lambda: RephraseSettings("textbook", prompt="{text}"), "rephrase.style='textbook' has no effect with a rephrase.prompt"),
        (lambda: RephraseSettings(min_ratio=3.0), "rephrase.min_ratio=3.0 must be at least 0 and below max_ratio=2.0"),
        (lambda: SpanSettings(spans=6), "questions.min_distance=0.2 of a document does not fit between 6 spans"),
        (lambda: SpanSettings(unit="tokens", min_distance=100), "questions.unit='tokens' needs questions.tokenizer"),
        (lambda: SpanSettings(tokenizer="bytes"), "questions.tokenizer='bytes' has no effect with unit='share'"),
        (lambda: SpanSettings(prompt="Ask."), "does not say where the spans stand; put {passages}"),
        (lambda: TaskSettings("needle"), "task.kind='needle' is unknown"),
        (lambda: TaskSettings(retrieval=TaskConfig(9)), "task.retrieval has no effect with task.kind='questions'"),
        (lambda: TaskSettings(questions=QuestionsConfig(answer_weight=2.0)), "answer_weight has no effect on text that is written"),
        (lambda: GeneratorConfig(), "config.generator has to have one of endpoint and local"),
        (lambda: GeneratorConfig(PRICED.endpoint, stop=("",)), "generator.stop=.* has an empty string"),
        (lambda: GeneratorConfig(PRICED.endpoint, temperature=-1.0), "generator.temperature=-1.0 must not be negative"),
        (lambda: EndpointGenerator("localhost:8000", "m"), "generator.endpoint has url='localhost:8000' and model='m'; give an"),
        (lambda: config_of(None, new=REPHRASE), "config.synthesize.new asks a model, but config.generator names none"),
        (lambda: config_of(PRICED), "config.generator has no effect, as no source of config.synthesize asks"),
        (lambda: config_of(new=SynthesizeConfig(sources=("b",))), "config.synthesize.new.sources='b' is unknown"),
        (lambda: config_of(a=REPHRASE), "config.synthesize has the name 'a', which is a source already"),
        (lambda: config_of(**{"../a": REPHRASE}), "config.synthesize has the name '../a', which becomes a folder"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_the_documented_config_is_one():
    text = (Path(__file__).parents[2] / "docs/data.md").read_text().partition("### Synthesis\n")[2]
    values = {"curated": curated, "defaults": defaults}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], values)
    built = configs.build(CurationConfig, values["config"])
    assert {one.method for one in built.synthesize.values()} == {"rephrase", "questions", "task"}
    assert built.generator.cost(0, 10**6) == 0.4


def test_shards_hold_at_least_so_many_bytes(tmp_path):
    lines = [(b"%d\n" % i, 40) for i in range(7)]
    assert stage.write(tmp_path / "s", iter(lines), 100) == (7, 280)
    assert [np.array(path.read_bytes().split(), int).tolist() for path in sorted((tmp_path / "s").glob("*"))] == [
        [0, 1, 2], [3, 4, 5], [6],
    ]  # fmt: skip
