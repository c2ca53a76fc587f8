"""The tokenizer in a GGUF file, as the files that lie next to a Hugging Face model, and back.

Two kinds are known: byte-level BPE (`gpt2`), which becomes a tokenizer.json, and SentencePiece (`llama`), which becomes a
tokenizer.model. How byte-level BPE cuts a text before it merges is only named in the file (`tokenizer.ggml.pre`); `CUTS` says what
the names mean, as published in the tokenizer.json of the first models of each name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcx.core import gguf
from lcx.core.errors import UserError
from lcx.core.extras import library
from lcx.core.gguf import Gguf
from lcx.data.tokenizers.special_tokens import files_next_to, read_json
from lcx.data.tokenizers.tiktoken_ranks import looks_like_ranks

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens (`tokenizer.ggml.token_type`); SentencePiece has the same numbers."""

ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Role of a special token -> its key's part in GGUF."""

_FORM = 1
"""Part of the name of unpacked files; to be raised when they come out differently."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """How byte-level BPE prepares a text: `pattern` (None: GPT-2's) cuts it, with `digits` each digit is a piece of its own.

    With `whole`, a piece that is in the vocabulary is one token whatever the merges say. `bos`: texts begin with begin-of-sequence
    if the file does not say. `nfc`: characters are composed first.
    """

    pattern: str | None = None
    digits: bool = False
    whole: bool = False
    bos: bool = False
    nfc: bool = False

    def normalizer(self) -> dict[str, Any] | None:
        """The normalizer of a tokenizer.json."""
        return {"type": "NFC"} if self.nfc else None

    def pre_tokenizer(self) -> dict[str, Any]:
        """The pre-tokenizer of a tokenizer.json."""
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": self.pattern is None}
        steps: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if self.digits else []
        if self.pattern is not None:
            steps.append({"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False})
        return {"type": "Sequence", "pretokenizers": [*steps, level]} if steps else level


_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FIRST = r"[^\r\n\p{L}\p{N}]?"
_CASED = f"{_FIRST}{_UPPER}*{_LOWER}+%s|{_FIRST}{_UPPER}+{_LOWER}*%s"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

_LLAMA3 = Cut(rf"{_LETTERS}|\p{{N}}{{1,3}}{_REST}", whole=True, bos=True)
_QWEN2 = Cut(rf"{_LETTERS}|\p{{N}}{_REST}", nfc=True)
_GPT4O = Cut(_CASED % (_SHORT, _SHORT) + r"|\p{N}{1,3}" + _CASED_REST)

CUTS: dict[str, Cut] = {
    "gpt-2": Cut(),
    "smollm": Cut(digits=True),
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "tekken": Cut(_CASED % ("", "") + r"|\p{N}" + _CASED_REST, whole=True, bos=True),
    "gpt-4o": _GPT4O,
    "dbrx": dataclasses.replace(_LLAMA3, whole=False, bos=False),
    # Other names of the same.
    "phi-2": Cut(), "mpt": Cut(), "olmo": Cut(),
    "starcoder": Cut(digits=True), "refact": Cut(digits=True), "codeshell": Cut(digits=True), "minerva-7b": Cut(digits=True),
    "llama3": _LLAMA3, "llama-v3": _LLAMA3, "falcon3": _LLAMA3,
    "smaug-bpe": dataclasses.replace(_LLAMA3, whole=False, bos=False),
    "deepseek-r1-qwen": dataclasses.replace(_QWEN2, nfc=False),
    "llama4": _GPT4O,
}  # fmt: skip
"""`tokenizer.ggml.pre` -> what it means. When written, the first that fits is taken."""


def unpacked(path: str | Path) -> Path:
    """The folder with a GGUF file's tokenizer, chat template and special tokens as Hugging Face's files.

    They are written when first asked for, under `$XDG_CACHE_HOME/lcx/gguf` (`~/.cache/lcx/gguf`). Raises `UserError` for tokenizers
    that lcx does not know, and if the folder cannot be written.
    """
    found = gguf.read(path)
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in found.files]
    digest = hashlib.sha256(repr((_FORM, stamps)).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lcx" / "gguf"
    folder = cache / f"{gguf.stem(path)}-{digest}"
    if folder.is_dir():
        return folder
    content = files(found)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
        try:
            for name, raw in content.items():
                (part / name).write_bytes(raw)
            part.chmod(0o755)
            if not folder.is_dir():
                os.replace(part, folder)
        except FileExistsError:
            pass
        except OSError:
            # Another process was faster.
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}), where {path} keeps its tokenizer; "
            "set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return folder


def files(found: Gguf) -> dict[str, bytes]:
    """Name -> content of the files next to a Hugging Face model that hold a GGUF file's tokenizer, template and special tokens."""
    data, where = found.metadata, str(found.path)
    kind, tokens = data.get(f"{PREFIX}model"), data.get(f"{PREFIX}tokens")
    if not isinstance(tokens, list) or not tokens or kind in (None, "none"):
        raise UserError(f"{where} holds no tokenizer ({PREFIX}tokens); use a file that was converted with one")
    types = data.get(f"{PREFIX}token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise UserError(f"{where} has {len(tokens)} tokens and {len(types)} types of tokens; it is damaged, download it again")
    roles = {}
    for role, name in ROLES.items():
        number = data.get(f"{PREFIX}{name}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            roles[role] = tokens[number]
    settings: dict[str, Any] = {**roles, "clean_up_tokenization_spaces": False}
    if kind == "gpt2":
        pre = data.get(f"{PREFIX}pre")
        if pre not in CUTS:
            raise UserError(
                f"{where} cuts text as {pre!r} ({PREFIX}pre), which lcx does not know; it knows {', '.join(sorted(CUTS))}"
            )
        bos = data.get(f"{PREFIX}add_bos_token", CUTS[pre].bos)
        written = {"tokenizer.json": _bpe(where, tokens, types, data.get(f"{PREFIX}merges") or [], CUTS[pre], roles if bos else {})}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    elif kind == "llama":
        written = {"tokenizer.model": _pieces(where, tokens, types, data, roles)}
        settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": data.get(f"{PREFIX}add_bos_token", True)}
        settings |= {"add_eos_token": data.get(f"{PREFIX}add_eos_token", False), "legacy": False}
    else:
        raise UserError(
            f"{where} has a tokenizer of the kind {kind!r}, and lcx reads 'gpt2' (byte-level BPE) and 'llama' (SentencePiece)"
        )
    written["tokenizer_config.json"] = _json(settings)
    if template := data.get("tokenizer.chat_template"):
        written["chat_template.jinja"] = template.encode()
    if ends := end_ids(data):
        generation = {"bos_token_id": data.get(f"{PREFIX}bos_token_id"), "eos_token_id": ends[0] if len(ends) == 1 else ends}
        written["generation_config.json"] = _json({key: value for key, value in generation.items() if value is not None})
    return written


def end_ids(data: Mapping[str, Any]) -> list[int]:
    """Tokens at which a text, a turn or a message ends."""
    found = (data.get(f"{PREFIX}{name}_token_id") for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(number for number in found if isinstance(number, int)))


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _bpe(where: str, tokens: list[str], types: list[int], merges: list[str], cut: Cut, roles: Mapping[str, str]) -> bytes:
    """tokenizer.json of a byte-level BPE; `roles` has the begin-of-sequence token if texts begin with it."""
    tokenizers = library("tokenizers", where, "gguf")
    vocab = {token: i for i, (token, type_) in enumerate(zip(tokens, types, strict=True)) if type_ != UNUSED}
    pairs = []
    for merge in merges:
        # The first character is the pair's even if it is a space.
        at = merge.find(" ", 1)
        pairs.append((merge[:at], merge[at + 1 :]))
    added = [
        {
            "id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": type_ in (CONTROL, UNKNOWN),
        }
        for i, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if type_ in (CONTROL, USER_DEFINED, UNKNOWN)
    ]  # fmt: skip
    values: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": cut.normalizer(),
        "pre_tokenizer": cut.pre_tokenizer(),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": cut.whole, "vocab": vocab, "merges": pairs,
        },
    }  # fmt: skip
    if "bos_token" in roles:
        token = roles["bos_token"]
        first = {"SpecialToken": {"id": token, "type_id": 0}}
        text, other = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
        values["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, {"SpecialToken": {"id": token, "type_id": 1}}, other],
            "special_tokens": {token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]}},
        }
    raw = _json(values)
    try:
        tokenizers.Tokenizer.from_buffer(raw)
    except Exception as error:
        raise UserError(f"{where} has a vocabulary that the tokenizers library refuses ({error}); download it again") from error
    return raw


def _pieces(where: str, tokens: list[str], types: list[int], data: Mapping[str, Any], roles: Mapping[str, str]) -> bytes:
    """tokenizer.model of SentencePiece tokens, whose merges follow from their scores."""
    proto = _model_proto(where)
    scores = data.get(f"{PREFIX}scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise UserError(
            f"{where} has no score for each of its {len(tokens)} tokens ({PREFIX}scores); it is damaged, download it again"
        )
    model = proto.ModelProto()
    for token, score, type_ in zip(tokens, scores, types, strict=True):
        model.pieces.add(piece=token, score=score, type=type_)
    trained, normal = model.trainer_spec, model.normalizer_spec
    trained.model_type, trained.vocab_size, trained.byte_fallback = trained.BPE, len(tokens), BYTE in types
    for role, name in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unk"), ("pad_token", "pad")):
        if role in roles:
            setattr(trained, f"{name}_piece", roles[role])
            setattr(trained, f"{name}_id", tokens.index(roles[role]))
    if UNKNOWN in types:
        trained.unk_piece, trained.unk_id = tokens[types.index(UNKNOWN)], types.index(UNKNOWN)
    normal.name, normal.escape_whitespaces = "identity", True
    normal.add_dummy_prefix = bool(data.get(f"{PREFIX}add_space_prefix", True))
    normal.remove_extra_whitespaces = bool(data.get(f"{PREFIX}remove_extra_whitespaces", False))
    if charsmap := data.get(f"{PREFIX}precompiled_charsmap"):
        normal.precompiled_charsmap = bytes(one % 256 for one in charsmap)
    raw = model.SerializeToString()
    try:
        library("sentencepiece", where, "gguf").SentencePieceProcessor(model_proto=raw)
    except RuntimeError as error:
        raise UserError(f"{where} has a vocabulary that the sentencepiece library refuses ({error}); download it again") from error
    return raw


def _model_proto(where: str) -> Any:
    library("sentencepiece", where, "gguf")
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2


def metadata(folder: Path, size: int) -> dict[str, Any]:
    """What a GGUF file says about the tokenizer in a folder, for an embedding of `size` rows.

    Raises `UserError` if GGUF has no name for how it cuts text, and for other kinds than the two that `files` reads.
    """
    near = files_next_to(folder)
    pieces = folder / "tokenizer.model"
    if pieces.is_file() and not looks_like_ranks(pieces.read_bytes()):
        values, tokens = _of_pieces(folder, near.flag("add_bos_token", True), near.flag("add_eos_token", False))
    elif (folder / "tokenizer.json").is_file():
        values, tokens = _of_json(folder / "tokenizer.json")
    else:
        raise UserError(f"{folder} has neither a tokenizer.json nor a SentencePiece tokenizer.model, which GGUF could hold")
    if len(tokens) > size:
        raise UserError(
            f"the tokenizer in {folder} has {len(tokens)} tokens, and the model's vocabulary {size}; it belongs to another model"
        )
    count = len(tokens)
    # The file has a token for every row of the embedding.
    tokens = {**tokens, **{i: (f"[PAD{i}]", UNUSED, -1000.0) for i in range(size) if i not in tokens}}
    if count and max(tokens) >= size:
        raise UserError(f"the tokenizer in {folder} has ids up to {max(tokens)}, and the model's vocabulary ends at {size - 1}")
    values[f"{PREFIX}tokens"] = [tokens[i][0] for i in range(size)]
    if values[f"{PREFIX}model"] == "llama":
        values[f"{PREFIX}scores"] = [float(tokens[i][2]) for i in range(size)]
    values[f"{PREFIX}token_type"] = [int(tokens[i][1]) for i in range(size)]
    numbers = {token: i for i, token in enumerate(values[f"{PREFIX}tokens"])}
    for role, name in ROLES.items():
        if near.roles.get(role) in numbers:
            values[f"{PREFIX}{name}_token_id"] = numbers[near.roles[role]]
    _add_ends(folder, values)
    if (template := _template(folder)) is not None:
        values["tokenizer.chat_template"] = template
    return values


def _add_ends(folder: Path, values: dict[str, Any]) -> None:
    """The ends that generation_config.json names: the first is a text's if none is known, the next a turn's and a message's."""
    found = read_json(folder / "generation_config.json").get("eos_token_id")
    ends = [] if found is None else found if isinstance(found, list) else [found]
    known = values.get(f"{PREFIX}eos_token_id")
    if known is None and ends:
        known = values[f"{PREFIX}eos_token_id"] = int(ends[0])
    for name, number in zip(("eot", "eom"), [int(end) for end in ends if end != known], strict=False):
        values[f"{PREFIX}{name}_token_id"] = number


def _template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


Tokens = dict[int, tuple[str, int, float]]
"""Id -> token, type, score."""


def _of_json(path: Path) -> tuple[dict[str, Any], Tokens]:
    """Keys and tokens of a tokenizer.json."""
    values = read_json(path)
    model, added = values.get("model") or {}, values.get("added_tokens") or []
    if model.get("type") != "BPE" or (values.get("decoder") or {}).get("type") != "ByteLevel":
        raise UserError(
            f"{path} is not a byte-level BPE tokenizer, and GGUF holds those and SentencePiece models; "
            "put the model's tokenizer.model next to it"
        )
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    tokens: Tokens = {i: (token, NORMAL, 0.0) for token, i in model["vocab"].items()}
    tokens |= {entry["id"]: (entry["content"], CONTROL if entry.get("special") else USER_DEFINED, 0.0) for entry in added}
    found = {"model": "gpt2", "pre": _name(path, values, bool(pairs)), "add_bos_token": _begins(values)}
    if pairs:
        found["merges"] = pairs
    return {f"{PREFIX}{key}": value for key, value in found.items()}, tokens


def _name(path: Path, values: Mapping[str, Any], merges: bool) -> str:
    """The name of how a tokenizer.json cuts text."""
    if not merges:
        # Every byte is a token wherever a text is cut.
        return next(iter(CUTS))
    whole = bool(values["model"].get("ignore_merges"))
    given = (_plain(values.get("normalizer")), _plain(values.get("pre_tokenizer")))
    for name, cut in CUTS.items():
        if given == (_plain(cut.normalizer()), _plain(cut.pre_tokenizer())) and cut.whole == whole:
            return name
    raise UserError(f"{path} cuts text in a way for which GGUF has no name that lcx knows; it knows {', '.join(CUTS)}")


def _plain(step: Any) -> Any:
    """A step of a tokenizer.json without what does not change ids."""
    if not isinstance(step, Mapping):
        return step
    inner = [_plain(one) for one in [*step.get("pretokenizers", ()), *step.get("normalizers", ())]]
    if step.get("type") == "Sequence":
        return inner[0] if len(inner) == 1 else inner or None
    kept = {key: value for key, value in step.items() if key not in ("trim_offsets", "invert")}
    return {**kept, "invert": True} if step.get("invert") else kept


def _begins(values: Mapping[str, Any]) -> bool:
    """Whether the post-processor puts a token in front of a text."""
    step = values.get("post_processor") or {}
    steps = step.get("processors", [step])
    return any((one.get("single") or [{}])[0].get("SpecialToken") is not None for one in steps)


def _of_pieces(folder: Path, bos: bool, eos: bool) -> tuple[dict[str, Any], Tokens]:
    """Keys and tokens of a SentencePiece model and of what was added to it."""
    path = folder / "tokenizer.model"
    model = _model_proto(str(path)).ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:
        raise UserError(f"{path} is not a SentencePiece model ({error}); use the file that came with the model") from error
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise UserError(f"{path} is not a BPE model of SentencePiece, and GGUF's 'llama' tokenizers are; it cannot be exported")
    tokens: Tokens = {i: (one.piece, one.type, one.score) for i, one in enumerate(model.pieces)}
    special = {**files_next_to(folder).values.get("added_tokens_decoder", {})}
    added = {**read_json(folder / "added_tokens.json"), **files_next_to(folder).added_tokens()}
    for token, i in added.items():
        is_special = special.get(str(i), {}).get("special", True)
        if int(i) >= len(model.pieces):
            tokens[int(i)] = (token, CONTROL if is_special else USER_DEFINED, -1000.0)
    normal = model.normalizer_spec
    found: dict[str, Any] = {"model": "llama", "pre": "default", "add_bos_token": bos, "add_eos_token": eos}
    found |= {"add_space_prefix": normal.add_dummy_prefix, "remove_extra_whitespaces": normal.remove_extra_whitespaces}
    if normal.precompiled_charsmap:
        found["precompiled_charsmap"] = list(normal.precompiled_charsmap)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(model.trainer_spec, f"{name}_id")
        long = {"unk": "unknown", "pad": "padding"}.get(name, name)
        if 0 <= number < len(model.pieces):
            found[f"{long}_token_id"] = number
    return {f"{PREFIX}{key}": value for key, value in found.items()}, tokens
