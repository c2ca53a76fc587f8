"""lm_eval with a model of lcx against lm_eval with the same folder in transformers."""

import functools
import json
import os

import numpy as np
import pytest
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lcx.cli.main import main
from lcx.core.errors import UserError
from lcx.data.tokenizers import tokenizers
from lcx.evals import harness
from lcx.evals.backends.local import LocalBackend
from lcx.evals.text.prose import standard_library
from lcx.model.architecture import build_schemes
from lcx.recipes import models
from tests.evals.text_cases import bpe
from tests.interop import hf_models

LENGTH = 640
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama and a BPE with a token that ends texts, as Hugging Face stores them."""
    path = tmp_path_factory.mktemp("model")
    bpe(path)
    state = json.loads((path / "tokenizer.json").read_text())
    number = len(state["model"]["vocab"])
    state["added_tokens"] = [
        {
            "id": number,
            "content": "</s>",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    ]
    (path / "tokenizer.json").write_text(json.dumps(state))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    hf_models.make("llama", path, vocab_size=number + 1, max_position_embeddings=LENGTH, eos_token_id=number, bos_token_id=None)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    loaded = models.load(folder)
    run, schemes = loaded.run, build_schemes(loaded.run.model, loaded.schemes)
    tokenizer = tokenizers.load(str(folder))

    @functools.cache
    def backend(length):
        return LocalBackend(
            loaded.params, run.model, run.execution, schemes, length, 1024, tokenizer=tokenizer, stop_ids=loaded.stop_ids
        )

    return harness.HarnessModel(backend, tokenizer, LENGTH, None)


@pytest.fixture(scope="module")
def theirs(folder):
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)


def requests(kind, *arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def prose(first, words):
    return " ".join(standard_library().take(first, words))


def test_log_likelihoods_are_those_of_transformers(ours, theirs, capsys):
    asked = requests(
        "loglikelihood",
        ("", prose(0, 20)),
        ("a context that ends in spaces  ", "and goes on"),
        ("short", " x"),
        (prose(100, 30), " is"),
        (prose(300, 800), " which is longer than the model"),
        ("a text that ends</s>", "and another that begins"),
    )
    found, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    np.testing.assert_allclose([total for total, _ in found], [total for total, _ in expected], atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert "1 requests were longer than 640 tokens and lost their beginning" in capsys.readouterr().err


def test_rolling_log_likelihoods_are_those_of_transformers(ours, theirs):
    asked = requests("loglikelihood_rolling", (prose(0, 30),), (prose(500, 900),), ("x",))
    np.testing.assert_allclose(ours.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked), rtol=5e-6)


@pytest.mark.slow
def test_texts_are_those_of_transformers(ours, theirs):
    settings = {"do_sample": False, "max_gen_toks": 24, "until": []}
    cut = {**settings, "until": ["e", "\n"]}
    asked = requests(
        "generate_until",
        (prose(0, 20), settings),
        (prose(50, 90), cut),
        (prose(900, 10), cut),
        (prose(2000, 800), settings),
    )
    found = ours.generate_until(asked)
    assert found == theirs.generate_until(asked)
    assert found[0] and not any("e" in text for text in found[1:3])


def test_a_result_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = harness.write({"results": {}, "samples": {"one": [{"doc_id": 0}]}}, tmp_path, "found")
    assert json.loads(path.read_text()) == {"results": {}} and (tmp_path / "found-one.jsonl").read_text() == '{"doc_id": 0}\n'

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        harness.write({"results": {"one": 1}}, tmp_path, "found")
    assert json.loads(path.read_text()) == {"results": {}}


def test_answers_that_are_sampled_are_refused(ours):
    with pytest.raises(UserError, match="samples its answers .* greedily"):
        ours.generate_until(requests("generate_until", ("a", {"do_sample": True, "temperature": 0.7, "max_gen_toks": 4})))
    with pytest.raises(UserError, match="640 new tokens, which leaves no room in --length=640"):
        ours.generate_until(requests("generate_until", ("a", {"max_gen_toks": 640})))


def test_chats_are_written_by_the_template(ours, theirs):
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because"}]
    assert ours.apply_chat_template(turns[:1]) == theirs.apply_chat_template(turns[:1]) == "<|user|>Why?\n<|assistant|>"
    assert ours.apply_chat_template(turns, False) == theirs.apply_chat_template(turns, False)


@pytest.mark.slow
def test_tasks_have_the_results_of_transformers(folder, theirs, tmp_path, monkeypatch, capsys):
    own = tmp_path / "tasks"
    own.mkdir()
    (own / "docs.jsonl").write_text("".join(json.dumps({"text": prose(600 * i, 60)}) + "\n" for i in range(3)))
    (own / "own.yaml").write_text(
        f"task: own_perplexity\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {own}/docs.jsonl\n"
        "output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    )
    # The table of lm_eval's tasks takes many seconds to read.
    made = harness._Tasks({"tokenizer": str(folder), "max_seq_lengths": [512]}, own)
    monkeypatch.setattr(harness, "_Tasks", lambda metadata, include: made)
    monkeypatch.chdir(tmp_path)
    tasks = ["niah_single_1", "niah_multikey_2", "ruler_fwe", "own_perplexity"]
    command = [
        "harness", f"--checkpoint={folder}", f"--tasks={','.join(tasks)}", f"--include={own}", "--lengths=512", "--limit=3",
    ]  # fmt: skip
    main(command)
    said = capsys.readouterr()
    assert "| own_perplexity | bits_per_byte |" in said.out and "| niah_single_1 | 512 |" in said.out
    kept = tmp_path / "runs" / folder.name / "eval" / "harness"
    expected = evaluator.simple_evaluate(theirs, tasks=tasks, limit=3, task_manager=made, bootstrap_iters=0)
    for task in tasks:
        samples = [json.loads(line) for line in (kept / f"harness-{task}.jsonl").read_text().splitlines()]
        answers = [sample["resps"][0][0] for sample in expected["samples"][task]]
        if task == "own_perplexity":
            np.testing.assert_allclose([sample["resps"][0][0] for sample in samples], answers, atol=1e-2, rtol=5e-6)
        else:
            assert [sample["resps"][0][0] for sample in samples] == answers
            assert [sample["512"] for sample in samples] == [sample["512"] for sample in expected["samples"][task]]
    # What is answered is not asked again.
    monkeypatch.setattr(LocalBackend, "complete", None)
    monkeypatch.setattr(LocalBackend, "loglikelihood", None)
    before = (kept / "harness.json").read_text()
    main(command)
    assert json.loads((kept / "harness.json").read_text())["results"] == json.loads(before)["results"]
    with pytest.raises(UserError, match="lm_eval has no task 'nihil'"):
        made.load(["nihil"])
