import base64
import io
import json
import pathlib
import sys
import sysconfig

import numpy as np
import pytest
import sentencepiece
import tokenizers as library

from lcx.core.errors import UserError
from lcx.data.tokenizers import tokenizers
from lcx.data.tokenizers.tiktoken_ranks import _LLAMA3_PATTERN as LLAMA3_PATTERN

TEXTS = [
    "def f(self):\n    return 12 → ok\n\n\n\tx =  1",
    "naïve 東京 🙂🏽 \u200d",
    " begins and ends with spaces ",
    "".join(map(chr, range(1, 256))),
    "I'll 1234567 DON'T\r\n",
    "",
]


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


def test_special_tokens_are_spelled(byte_level):
    assert [tokenizers.load("bytes+bos+eos").special(i) for i in (255, 256, 257)] == [None, "<s>", "</s>"]
    assert [tokenizers.load("bytes+eos").special(i) for i in (255, 256)] == [None, "</s>"]
    assert [tokenizers.load(str(byte_level)).special(i) for i in (0, 1, 2)] == ["<s>", "</s>", None]


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


def test_a_token_that_the_files_say_is_not_there(tmp_path):
    word_level(tmp_path / "tokenizer.json", ["a", "b"], specials=["<s>", "</s>"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None}))
    tokenizer = tokenizers.load(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.specials) == (None, 1, {"eos_token": "</s>"})


def test_fingerprints_differ_with_the_vocabulary(tmp_path):
    word_level(tmp_path / "one.json", ["a", "b"])
    word_level(tmp_path / "two.json", ["b", "a"])
    one, two = (tokenizers.load(str(tmp_path / name)) for name in ("one.json", "two.json"))
    assert one.fingerprint != two.fingerprint


def test_wrong_names(tmp_path):
    with pytest.raises(UserError, match="did you mean 'bytes'"):
        tokenizers.load("byte")
    with pytest.raises(UserError, match="does not exist"):
        tokenizers.load("somewhere/tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot|can be read"):
        tokenizers.load(str(tmp_path))
    word_level(tmp_path / "words.json", ["a", "b"])
    with pytest.raises(UserError, match="characters of several bytes"):
        tokenizers.load("bytes").characters("é")


@pytest.fixture(scope="module")
def lines():
    """Some of the standard library, to train small vocabularies on."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse.py", "ast.py", "json/decoder.py")
    return [line for name in names for line in (folder / name).read_text().splitlines() if line.strip()]


def piece_model(lines, **given):
    out = io.BytesIO()
    options = {"vocab_size": 700, "character_coverage": 1.0, "normalization_rule_name": "identity", "minloglevel": 2}
    options |= {"remove_extra_whitespaces": False, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **options | given)
    return out.getvalue()


@pytest.fixture(scope="module")
def pieces(lines, tmp_path_factory):
    """A SentencePiece BPE model with byte fallback, as Llama 2's, in a folder of its own."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "tokenizer.model").write_bytes(piece_model(lines, model_type="bpe", byte_fallback=True))
    return folder


@pytest.fixture(scope="module")
def ranks(lines, tmp_path_factory):
    """(rank file, the same merges in a `tokenizer.json` made and read by another library)."""
    folder = tmp_path_factory.mktemp("ranks")
    other = library.Tokenizer(library.models.BPE(ignore_merges=True))
    split = library.pre_tokenizers.Split(library.Regex(LLAMA3_PATTERN), "isolated")
    bytes_ = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    other.pre_tokenizer = library.pre_tokenizers.Sequence([split, bytes_])
    other.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    other.train_from_iterator(lines, library.trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False))
    vocabulary = other.get_vocab()
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    printable = {chr(byte): byte for byte in shown}
    printable |= {chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in shown)}
    as_bytes = {bytes(printable[c] for c in token): id for token, id in vocabulary.items()}
    path = folder / "code.tiktoken"
    write_ranks(path, as_bytes)
    special = {"<|bos|>": 800, "<|end|>": 802}
    form = {"pattern": LLAMA3_PATTERN, "special_tokens": special, "bos_token": "<|bos|>", "eos_token": "<|end|>"}
    (folder / "code.tiktoken.json").write_text(json.dumps({**form, "begins_with_bos": True}))
    return path, other


def write_ranks(path, ranks):
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentence_piece_round_trips(kind, lines, tmp_path):
    (tmp_path / "small.model").write_bytes(piece_model(lines, model_type=kind, byte_fallback=True))
    tokenizer = tokenizers.load(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.specials["eos_token"]) == (1, 2, "</s>")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.size == 0 or ids.max() < tokenizer.vocab_size
        assert tokenizer.decode(np.concatenate([[1], ids, [2, 10**6]]).astype(int)) == text
    assert tokenizer.encode(b"a</s>").tolist() == tokenizer.encode("a</s>").tolist()
    assert 2 not in tokenizer.encode("a</s>")
    # Every byte value has a token of its own, and these spell every text.
    for byte in range(256):
        assert tokenizer._id(f"<0x{byte:02X}>") is not None
    assert tokenizer.decode(tokenizer.characters("a1#=\n")).strip() == "a1#="
    assert tokenizers.load(str(tmp_path / "small.model")).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("legacy", [False, True])
def test_sentence_piece_equals_transformers(legacy, pieces, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.model").write_bytes((pieces / "tokenizer.model").read_bytes())
    added = {"700": {"content": "<|im_start|>", "special": True}, "701": {"content": "<|im_end|>", "special": True}}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": legacy, "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = tokenizers.load(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.vocab_size == len(theirs) == 702
    # Where a text begins with a space, SentencePiece puts its own in front and transformers 5 does not.
    for text in (text for text in TEXTS if not text.startswith(" ")):
        np.testing.assert_array_equal(ours.encode(text), theirs(text, add_special_tokens=False).input_ids)
        np.testing.assert_array_equal(tokenizers.prompt(ours, text), theirs(text).input_ids)
    chat = f"<s><|im_start|>user\nself é<|im_end|>\n<|im_start|>{'' if legacy else '  '}return 1</s>def"
    ids, places = ours.encode_chat(chat)
    np.testing.assert_array_equal(ids, theirs(chat, add_special_tokens=False).input_ids)
    assert [chat[a:b] for (a, b), id in zip(places, ids, strict=True) if id in (1, 2, 700, 701)] == [
        "<s>", "<|im_start|>", "<|im_end|>", "<|im_start|>", "</s>",
    ]  # fmt: skip
    assert [ours.special(i) for i in (1, 2, 700, 701, 300)] == ["<s>", "</s>", "<|im_start|>", "<|im_end|>", None]
    assert ours.decode(ids).split() == ["user", "self", "é", "return", "1def" if not legacy else "1", *["def"] * legacy]


def test_ranks_equal_another_library(ranks):
    path, other = ranks
    ours = tokenizers.load(str(path))
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.begins_with_bos) == (803, 800, 802, True)
    for text in [*TEXTS, "x" * 3000, " " * 3000]:
        ids = ours.encode(text)
        np.testing.assert_array_equal(ids, other.encode(text).ids)
        assert ours.decode(np.concatenate([[800], ids, [802, 801, 5000]]).astype(int)) == text
    assert sorted(ours.decode(np.array([ours._ordinary(chr(i))[0]])) for i in range(128)) == list(map(chr, range(128)))
    assert ours.decode(ours.characters("a1#=\n")) == "a1#=\n"
    assert ours.encode("<|end|>").max() < 800
    assert [ours.special(i) for i in (799, 800, 802)] == [None, "<|bos|>", "<|end|>"]
    chat = "<|bos|>user é🙂<|end|>\n"
    ids, places = ours.encode_chat(chat)
    assert ids[0] == 800 and (ids == 802).sum() == 1
    pieces = {tuple(place): chat[slice(*place)] for place in places.tolist()}
    assert {"<|bos|>", "<|end|>", "\n"} <= set(pieces.values())
    covered = np.zeros(len(chat), bool)
    for start, end in places:
        covered[start:end] = True
    assert covered.all()


def test_ranks_of_runs_that_the_library_cannot_take(ranks):
    ours = tokenizers.load(str(ranks[0]))
    for text in (" " * 10**6, "\n" * 10**6 + "x", "a" * 10**6):
        assert ours.decode(ours.encode(text)) == text


def test_llama_3_ranks_in_a_tokenizer_model(tmp_path):
    """Its `original/tokenizer.model`: 128,000 ranks, here of made-up tokens, told from SentencePiece by its content."""
    tokens = [bytes([i]) for i in range(256)] + [bytes([i, j]) for i in range(256) for j in range(256)]
    tokens += [bytes([i, j, k]) for i in range(4) for j in range(256) for k in range(256)][: 128_000 - len(tokens)]
    write_ranks(tmp_path / "tokenizer.model", {token: i for i, token in enumerate(tokens)})
    ours = tokenizers.load(str(tmp_path))
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.begins_with_bos) == (128_256, 128_000, 128_001, True)
    # Ids as published: https://github.com/meta-llama/llama-models, models/llama3/tokenizer.py.
    published = {"<|finetune_right_pad_id|>": 128_004, "<|start_header_id|>": 128_006, "<|end_header_id|>": 128_007}
    published |= {
        "<|eom_id|>": 128_008,
        "<|eot_id|>": 128_009,
        "<|python_tag|>": 128_010,
        "<|reserved_special_token_246|>": 128_255,
    }
    assert [ours.encode_chat(token)[0].tolist() for token in published] == [[id] for id in published.values()]
    assert tokenizers.prompt(ours, "ab")[0] == 128_000


def save(tokenizer, folder, **config):
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return folder


@pytest.mark.parametrize("opens", ["template", "bytes", "nothing"])
@pytest.mark.parametrize("said", [None, True, False])
def test_begin_of_sequence_as_transformers(opens, said, byte_level, tmp_path):
    """What a prompt begins with, for all post-processors and whatever tokenizer_config.json says of `add_bos_token`."""
    from transformers import AutoTokenizer

    tokenizer = library.Tokenizer.from_file(str(byte_level))
    if opens == "template":
        template = library.processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)])
        tokenizer.post_processor = template
    elif opens == "bytes":
        tokenizer.post_processor = library.processors.ByteLevel(trim_offsets=False)
    config = {"bos_token": "<s>", "eos_token": "</s>", **({} if said is None else {"add_bos_token": said})}
    folder = save(tokenizer, tmp_path / "it", **config)
    ours, theirs = tokenizers.load(str(folder)), AutoTokenizer.from_pretrained(folder)
    assert ours.begins_with_bos == (opens == "template")
    for text in TEXTS[:-1]:
        np.testing.assert_array_equal(tokenizers.prompt(ours, text), theirs(text).input_ids)
        np.testing.assert_array_equal(ours.encode(text), theirs(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize(("said", "begins"), [({}, True), ({"add_bos_token": True}, True), ({"add_bos_token": False}, False)])
def test_begin_of_sequence_of_sentence_piece(said, begins, pieces, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((pieces / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**said, "add_eos_token": True}))
    ours = tokenizers.load(str(tmp_path))
    assert ours.begins_with_bos == begins
    assert tokenizers.prompt(ours, "a").tolist() == [1] * begins + ours.encode("a").tolist()


def test_begin_of_sequence_of_bytes():
    assert tokenizers.prompt(tokenizers.load("bytes"), "a").tolist() == [97]
    assert tokenizers.prompt(tokenizers.load("bytes+bos+eos"), "a").tolist() == [256, 97]
    ids, places = tokenizers.load("bytes+bos+eos").encode_chat("<s>é</s>")
    assert ids.tolist() == [256, *"é".encode(), 257]
    assert places.tolist() == [[0, 3], [3, 4], [3, 4], [4, 8]]


def damaged(folder, raw, form=None):
    path = folder / "x.tiktoken"
    path.write_bytes(raw)
    if form is not None:
        (folder / "x.tiktoken.json").write_text(form if isinstance(form, str) else json.dumps(form))
    return str(path)


BYTES = {bytes([i]): i for i in range(256)}
FORMS = [
    (None, "not Llama 3's 128,000.*x.tiktoken.json"),
    ("{", "cannot be read as JSON"),
    ("[1]", "expected a JSON object, got list"),
    ({"patern": "."}, "did you mean 'pattern'"),
    ({"special_tokens": {}}, "has no pattern"),
    ({"pattern": "("}, "not a regular expression"),
    ({"pattern": ".", "special_tokens": {"<a>": 5}}, "ids of at least 256"),
    ({"pattern": ".", "special_tokens": {"<a>": 256, "<b>": 256}}, "the same id"),
    ({"pattern": ".", "special_tokens": {"<a>": 256}, "eos_token": "<aa>"}, "did you mean '<a>'"),
    ({"pattern": ".", "begins_with_bos": True}, "true needs bos_token"),
]


@pytest.mark.parametrize(("form", "message"), FORMS)
def test_descriptions_of_ranks_that_are_wrong(form, message, tmp_path):
    write_ranks(tmp_path / "x", BYTES)
    with pytest.raises(UserError, match=message):
        tokenizers.load(damaged(tmp_path, (tmp_path / "x").read_bytes(), form))


def test_damaged_files(tmp_path, pieces):
    form = {"pattern": "."}
    with pytest.raises(UserError, match="x.tiktoken:2 is not a base64 token and its rank"):
        tokenizers.load(damaged(tmp_path, b"YQ== 0\nYg=", form))
    with pytest.raises(UserError, match="the 2 ranks of .* are not 0 to 1"):
        tokenizers.load(damaged(tmp_path, b"YQ== 0\nYg== 0\n", form))
    with pytest.raises(UserError, match="no token for the byte 0x00"):
        tokenizers.load(damaged(tmp_path, b"YQ== 0\nYg== 1\n", form))
    raw = (pieces / "tokenizer.model").read_bytes()
    for content in (b"", b"garbage", raw[: len(raw) // 2], bytes(100)):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(UserError, match="neither a SentencePiece model nor a file of tiktoken ranks"):
            tokenizers.load(str(tmp_path / "bad.model"))
    (tmp_path / "tokenizer.model").write_bytes(raw)
    (tmp_path / "tokenizer_config.json").write_text("{nothing")
    with pytest.raises(UserError, match="tokenizer_config.json cannot be read as JSON"):
        tokenizers.load(str(tmp_path / "tokenizer.model"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_git_lfs_pointer(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n")
    with pytest.raises(UserError, match=rf"{name} is a Git LFS pointer, not the file itself; run 'git lfs pull'"):
        tokenizers.load(str(tmp_path))


def test_folders(tmp_path):
    with pytest.raises(UserError, match="with no tokenizer.json"):
        tokenizers.load(str(tmp_path))
    for name in ("one.model", "two.model"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="with several: one.model, two.model"):
        tokenizers.load(str(tmp_path))


@pytest.mark.parametrize("missing", ["tokenizers", "sentencepiece", "tiktoken"])
def test_missing_library_names_the_extra(missing, byte_level, pieces, ranks, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    path = {"tokenizers": byte_level, "sentencepiece": pieces, "tiktoken": ranks[0]}[missing]
    with pytest.raises(UserError, match=rf"needs the {missing} library; .*\.\[hf\]"):
        tokenizers.load(str(path))
