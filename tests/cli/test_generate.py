"""`lcx generate` through the real command line: text, labels, figures, and the same tokens on a mesh."""

import json
import re

import pytest

from lcx import api
from lcx.cli.main import main

SPEEDS = r"prefill [\d,]+ tokens/s, decode [\d,.]+ tokens/s \(excluding [\d.]+ s of compilation and setup\)"
FIGURES = rf"\d+ prompt tokens, \d+ new; {SPEEDS}"


@pytest.fixture
def lcx(run, capsys):
    def generate(*words):
        main(["generate", f"--checkpoint={run}", *words])
        return capsys.readouterr()

    return generate


def test_only_text_is_written_to_standard_output(lcx, run):
    written = lcx("--prompt=def f(x):", "--max_new_tokens=20")
    assert re.fullmatch(FIGURES, written.err.strip()) and "9 prompt tokens, 20 new" in written.err
    assert written.out == api.generate(api.load(run), ["def f(x):"], max_new_tokens=20)[0].text + "\n"


def test_several_prompts_are_labelled_and_seeds_repeat(lcx, run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("import os", "class A")))
    words = (f"--prompt_file={file}", "--prompt=x = 1", "--max_new_tokens=12", "--temperature=1", "--top_k=40", "--seed=5")
    once, again = (lcx(*words) for _ in range(2))
    assert all(f"prompt {i}, 12 new tokens, ended by length:" in once.err for i in (1, 2, 3))
    assert once.out == again.out and once.out.endswith("\n\n")
    assert "21 prompt tokens, 36 new" in once.err
    prompts, sampled = ["x = 1", "import os", "class A"], {"temperature": 1.0, "top_k": 40, "seed": 5}
    completions = api.generate(api.load(run), prompts, max_new_tokens=12, **sampled)
    assert once.out == "".join(f"{completion.text}\n\n" for completion in completions)


@pytest.mark.slow
def test_a_mesh_gives_the_same_text(lcx):
    words = ("--prompt=import collections as c", "--max_new_tokens=10", "--temperature=1")
    alone, split = (lcx(*words, *more).out for more in ((), ("--context=2", "--tensor=2", "--chunk=8")))
    assert alone == split != ""


@pytest.mark.slow
def test_more_than_was_trained_is_remarked(lcx):
    longer = lcx("--prompt=" + "y" * 130, "--max_new_tokens=3")
    assert "up to 133 tokens are wanted, but the weights were trained up to 128" in longer.err
