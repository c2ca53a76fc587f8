"""Text of tokens as they come: whole characters, nothing of or behind a stop string, the same text however it is streamed."""

import dataclasses

import jax
import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.core.param_spec import initialize
from lcx.data.tokenizers.stream import Stream
from lcx.data.tokenizers.tokenizers import Bytes, HuggingFace
from lcx.model.architecture import build_architecture, build_schemes
from lcx.model.config import ModelConfig
from lcx.model.decode import generate
from lcx.model.execution import ExecutionConfig
from lcx.model.params import specs
from lcx.model.sampling import Sampling
from lcx.recipes.generation import generate_text, read_prompts

CONFIG = ModelConfig(vocab_size=257, model_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32)
SCHEMES = build_schemes(CONFIG, {"default": "rope:theta=500"})
TOKENIZER = Bytes(eos=True)
TEXT = "Ünïcödé – 漢字 🎉 and plain words.\nEND of it"


@pytest.fixture(scope="module")
def params():
    return initialize(specs(CONFIG, SCHEMES, 64), jax.random.key(0))


def pieces(tokenizer, tokens, stop=(), before=()):
    stream = Stream(tokenizer, stop, before)
    out = []
    for token in tokens:
        out.append(stream.add(token))
        if stream.stopped:
            break
    return [*out, stream.finish()], stream


def test_characters_come_whole():
    out, stream = pieces(TOKENIZER, TOKENIZER.encode(TEXT))
    assert "".join(out) == stream.text == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in out)
    # As soon as its last byte is there, and not later.
    assert out[0] == "" and out[1] == "Ü" and out[2] == "n"


def test_bytes_that_are_no_character_are_shown_once_it_is_certain():
    out, _ = pieces(TOKENIZER, [0xE6, 0xBC, ord("a"), ord("b"), 0xF0])
    assert out == ["", "", "\N{REPLACEMENT CHARACTER}a", "b", "", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize(
    "stop, wanted",
    [
        (["END"], TEXT.partition("END")[0]),
        (["字 🎉"], TEXT.partition("字")[0]),
        (["plain", "nd"], "Ünïcödé – 漢字 🎉 a"),
        (["\n"], TEXT.partition("\n")[0]),
        (["not there", "ENDING"], TEXT),
        (["it!"], TEXT),
    ],
)
def test_nothing_of_a_stop_string_or_behind_it_is_ever_given_out(stop, wanted):
    tokens = TOKENIZER.encode(TEXT)
    out, stream = pieces(TOKENIZER, tokens, stop)
    assert "".join(out) == stream.text == wanted
    assert stream.stopped == (wanted != TEXT)
    if stream.stopped:
        assert len(stream.tokens) < len(tokens)


def test_what_may_become_a_stop_string_is_held_until_it_does_not():
    out, _ = pieces(TOKENIZER, TOKENIZER.encode("ababac"), ["abac", "abad"])
    assert "".join(out) == "ab"
    out, _ = pieces(TOKENIZER, TOKENIZER.encode("abax"), ["abac"])
    assert out == ["", "", "", "abax", ""]


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_spaces_between_words_survive(kind, tmp_path):
    """Decoded for themselves, the first new tokens of a SentencePiece-like vocabulary would lose their space."""
    library = pytest.importorskip("tokenizers")
    words = "the quick brown fox jumps over the lazy dog"
    tokenizer = library.Tokenizer(library.models.BPE())
    if kind == "sentencepiece":
        tokenizer.pre_tokenizer = library.pre_tokenizers.Metaspace()
        tokenizer.decoder = library.decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([words, TEXT] * 5, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = HuggingFace(tmp_path / "tokenizer.json")
    tokens = loaded.encode(words)
    for cut in range(1, len(tokens)):
        out, _ = pieces(loaded, tokens[cut:], before=tokens[max(0, cut - 8) : cut])
        assert loaded.decode(tokens[:cut]) + "".join(out) == words


def test_text_is_that_of_the_tokens_and_ends_where_asked(params):
    prompts = ["def f(", "a longer prompt than that"]
    sampling = Sampling(1.5, seed=4)
    streamed, finished = ["", ""], []

    def on_text(row, piece):
        streamed[row] += piece

    def run(**options):
        return generate_text(params, CONFIG, ExecutionConfig(), SCHEMES, TOKENIZER, prompts, 24, sampling=sampling, **options)

    found = run(on_text=on_text, on_end=lambda row, completion: finished.append((row, completion)))
    arch, buffers = build_architecture(CONFIG, ExecutionConfig(), SCHEMES, len(prompts[1]) + 24)
    plain = generate(params, buffers, arch, [TOKENIZER.encode(p) for p in prompts], 24, sampling=sampling, stop_ids=[256])
    for row, completion in enumerate(found):
        np.testing.assert_array_equal(completion.tokens, plain[row])
        assert completion.text == streamed[row] == TOKENIZER.decode(plain[row])
        assert completion.ended == ("eos" if plain[row][-1] == 256 else "length")
    assert sorted(row for row, _ in finished) == [0, 1]
    # The first piece of the first text that is a character: its row stops before it, the other goes on as before.
    stop = next(c for c in found[0].text if c not in found[1].text and c != "\N{REPLACEMENT CHARACTER}")
    stopped = run(stop=[stop])
    assert stopped[0].ended == "stop" and stopped[0].text == found[0].text.partition(stop)[0]
    assert stopped[1].text == found[1].text and len(stopped[0].tokens) < 24


def test_a_length_beyond_training_is_remarked_and_other_positions_are_taken(params, capsys):
    wide = dataclasses.replace(CONFIG)
    plain = generate_text(params, wide, ExecutionConfig(), SCHEMES, TOKENIZER, ["x" * 40], 8, trained=16)
    assert "up to 48 tokens are wanted, but the weights were trained up to 16" in capsys.readouterr().err
    scaled = generate_text(params, wide, ExecutionConfig(), SCHEMES, TOKENIZER, ["x" * 40], 8, trained=16, positions="linear")
    assert capsys.readouterr().err == ""
    assert len(plain[0].tokens) == len(scaled[0].tokens) == 8


@pytest.mark.parametrize(
    "prompts, options, says",
    [
        ([], {}, "no prompt given; give at least one"),
        (["a", ""], {}, "prompt 2 is empty; write at least one character"),
        (["a"], {"stop": ["", "b"]}, "a stop string is empty"),
        (["a"], {"positions": "yarm"}, "'yarm' is unknown; did you mean 'yarn'"),
        (["a"], {"positions": "t5"}, "positions='t5' learns table"),
    ],
)
def test_wrong_inputs(prompts, options, says, params):
    with pytest.raises(UserError, match=says):
        generate_text(params, CONFIG, ExecutionConfig(), SCHEMES, TOKENIZER, prompts, 4, **options)


def test_prompt_files(tmp_path):
    (tmp_path / "one.txt").write_text("line\nline\n")
    (tmp_path / "many.jsonl").write_text('{"prompt": "a\\nb"}\n\n{"prompt": "c", "id": 3}\n')
    assert read_prompts(str(tmp_path / "one.txt")) == ["line\nline\n"]
    assert read_prompts(str(tmp_path / "many.jsonl")) == ["a\nb", "c"]


def test_a_prompt_begins_with_bos_once_and_only_where_the_model_was_made_so():
    from lcx.recipes.generation import _encode

    assert _encode(Bytes(bos=True), "ab", 0, 300, None, None).tolist() == [256, 97, 98]
    assert _encode(Bytes(), "ab", 0, 300, None, None).tolist() == [97, 98]
    with pytest.raises(UserError, match="prompt 1 is empty"):
        _encode(Bytes(bos=True), "", 0, 300, None, None)
    with pytest.raises(
        UserError, match="prompt 1 has token 256, but the model's vocabulary ends at 99; the tokenizer belongs to another model"
    ):
        _encode(Bytes(bos=True), "ab", 0, 100, None, None)
