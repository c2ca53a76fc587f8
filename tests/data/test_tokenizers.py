import builtins
import json

import numpy as np
import pytest
import tokenizers as library

from lcx.core.errors import UserError
from lcx.data import tokenizers


def word_level(path, vocabulary, specials=()):
    model = library.models.WordLevel({token: i for i, token in enumerate([*specials, *vocabulary])}, unk_token=vocabulary[0])
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    if specials:
        tokenizer.add_special_tokens(list(specials))
    tokenizer.enable_truncation(max_length=3)
    tokenizer.save(str(path))


@pytest.fixture
def byte_level(tmp_path):
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(["def return self import 12 34 == =\n"] * 50, trainer)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize(
    ("name", "size", "bos", "eos"),
    [("bytes", 256, None, None), ("bytes+bos", 257, 256, None), ("bytes+eos", 257, None, 256), ("bytes+bos+eos", 258, 256, 257)],
)
def test_bytes(name, size, bos, eos):
    tokenizer = tokenizers.load(name)
    text = "naïve → x=1\n\x00"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.fingerprint) == (size, bos, eos, name)
    assert bytes(ids.tolist()) == text.encode()
    specials = [special for special in (bos, eos) if special is not None]
    assert tokenizer.decode(np.concatenate([specials, ids]).astype(int)) == text


def test_hugging_face_round_trip(byte_level):
    tokenizer = tokenizers.load(str(byte_level))
    text = "def f(self):\n    return 12 → ok"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    ids = tokenizer.characters("a1#=\n")
    assert tokenizer.decode(ids) == "a1#=\n"
    assert tokenizers.load(str(byte_level.parent)).fingerprint == tokenizer.fingerprint


def test_stored_truncation_is_switched_off(tmp_path):
    word_level(tmp_path / "tokenizer.json", ["a", "b"])
    assert len(tokenizers.load(str(tmp_path / "tokenizer.json")).encode("a b a b a b")) == 6


def test_special_tokens_named_beside_the_tokenizer(tmp_path):
    word_level(tmp_path / "tokenizer.json", ["a", "b"], specials=["[X]", "[Y]"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "[X]"}, "eos_token": "[Y]"}))
    tokenizer = tokenizers.load(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


def test_fingerprints_differ_with_the_vocabulary(tmp_path):
    word_level(tmp_path / "one.json", ["a", "b"])
    word_level(tmp_path / "two.json", ["b", "a"])
    one, two = (tokenizers.load(str(tmp_path / name)) for name in ("one.json", "two.json"))
    assert one.fingerprint != two.fingerprint


def test_wrong_names(tmp_path):
    with pytest.raises(UserError, match="did you mean 'bytes'"):
        tokenizers.load("byte")
    with pytest.raises(UserError, match="not there"):
        tokenizers.load("somewhere/tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot|can be read"):
        tokenizers.load(str(tmp_path))
    word_level(tmp_path / "words.json", ["a", "b"])
    with pytest.raises(UserError, match="characters of several bytes"):
        tokenizers.load("bytes").characters("é")


def test_missing_library_names_the_extra(byte_level, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"\.\[hf\]"):
        tokenizers.load(str(byte_level))
