"""`lcx chat` through the real command line: lines in, answers out; what is typed at a terminal; wrong inputs."""

import io
import signal
import sys

import pytest

from lcx import api
from lcx.cli import chat
from lcx.cli.main import main
from lcx.recipes import models
from tests import chat_model

WORDS = ("--max_new_tokens=8", "--temperature=1", "--seed=3")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chat_model.make(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture
def lcx(model, capsys, monkeypatch):
    def run(text, *words):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        main(["chat", f"--checkpoint={model}", *WORDS, *words])
        return capsys.readouterr()

    return run


def answer(model, prompt, seed=3, **options):
    return api.generate(models.load(model), [prompt], chat=True, max_new_tokens=8, temperature=1.0, seed=seed, **options)[0].text


def test_lines_are_answered_on_standard_output_and_nothing_else_is(lcx, model, tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time.\n")
    written = lcx(f"\nWho?\n/reset\n/file {tmp_path}/text.txt\nWhat?\n/context\n/quit\nnever asked\n")
    told = answer(model, "Once upon a time.\n\n\nWhat?", seed=4)
    assert written.out == f"{answer(model, 'Who?')}\n{told}\n"
    said = written.err
    assert "of 512 tokens (" in said and "text.txt: 18 tokens, put before the next question" in said
    assert "the answer was cut after 8 tokens; --max_new_tokens allows more" in said
    assert "Once upon a time. What?" in said and "tokens are in the cache" in said and "the template" in said


def test_flags(lcx, model, tmp_path):
    (tmp_path / "text.txt").write_text("Long.")
    written = lcx("Who?", f"--file={tmp_path / 'text.txt'}", "--system=Be kind.", "--length=60")
    assert written.out == answer(model, "Long.\n\nWho?", system="Be kind.") + "\n"
    assert "of 60 tokens" in written.err and "text.txt: 5 tokens, put before the first question" in written.err
    assert "warning: the context has room for 4 more tokens; /reset begins a new one" in written.err


def test_generate_asks_in_the_same_words(model, capsys):
    main(["generate", f"--checkpoint={model}", "--chat", "--system=Be kind.", "--prompt=Who?", *WORDS])
    assert capsys.readouterr().out == answer(model, "Who?", system="Be kind.") + "\n"


def test_at_a_terminal(model, capsys, monkeypatch):
    typed = iter(["/help", "/hlep", KeyboardInterrupt(), "Who?", "/file", "x" * 600, EOFError()])

    def read(prompt):
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(chat, "_at_terminal", lambda: True)
    main(["chat", f"--checkpoint={model}", *WORDS])
    written = capsys.readouterr()
    assert answer(model, "Who?") in written.out
    said = written.err
    assert "a context of 512 tokens; /help lists commands" in said and "/file PATH  put a text before the next question" in said
    assert "error: there is no command /hlep; did you mean '/help'?" in said
    assert "error: /file needs the path of a text file" in said
    assert "leaves no room for an answer in 512" in said
    assert next(typed, None) is None


def test_the_first_interrupt_ends_an_answer_and_the_second_the_program():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), chat._interruptible() as is_stopped:
        assert not is_stopped()
        signal.raise_signal(signal.SIGINT)
        assert is_stopped()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        ("/fiel x\n", (), "there is no command /fiel; did you mean '/file'?"),
        ("/file nowhere.txt\n", (), "file nowhere.txt does not exist; name a text file"),
        ("/reset now\n", (), "/reset takes nothing behind it; got 'now'"),
        ("\udcff\n", (), "standard input is not UTF-8 text; convert it"),
        ("", ("--file=nowhere.txt",), "file nowhere.txt does not exist"),
        ("", ("--positions=yarn",), "--positions='yarn' names no factor; say with --length=N"),
        ("", ("--temperature=0", "--top_k=3"), "--top_k=3 only applies to sampling"),
        ("", ("--chat_template=nowhere.jinja",), "chat template nowhere.jinja cannot be read"),
        ("", ("again",), "unexpected argument 'again'; see lcx chat --help"),
    ],
)
def test_wrong_inputs(text, words, says, model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    with pytest.raises(SystemExit) as left:
        main(["chat", f"--checkpoint={model}", *WORDS, *words])
    said = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 1 and said[-1].startswith("error: ") and says in said[-1], said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--system=a",), "--system belongs to --chat, which is not given"),
        (("--chat_template=a",), "--chat_template belongs to --chat, which is not given"),
    ],
)
def test_flags_of_a_chat_without_one(words, says, model, capsys):
    with pytest.raises(SystemExit):
        main(["generate", f"--checkpoint={model}", "--prompt=a", *words])
    assert says in capsys.readouterr().err


def test_a_run_without_template(run, capsys):
    with pytest.raises(SystemExit):
        main(["chat", f"--checkpoint={run}"])
    assert f"{run} has no chat template; name a file with one with --chat_template=FILE" in capsys.readouterr().err
