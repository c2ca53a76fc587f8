"""lcx's byte tokenizer in the format of transformers."""

from __future__ import annotations

import json
from pathlib import Path

from lcx.core.extras import library

BOS, EOS = "<s>", "</s>"


def write(out: Path, bos: bool, eos: bool) -> None:
    """Write tokenizer.json and tokenizer_config.json to a folder: one id per byte, then the special tokens, if any."""
    tokenizers = library("tokenizers", f"{out}/tokenizer.json")
    vocab = {character: byte for byte, character in enumerate(_characters())}
    special = [token for token, wanted in ((BOS, bos), (EOS, eos)) if wanted]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {key: token for key, token in (("bos_token", BOS), ("eos_token", EOS)) if token in special}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _characters() -> list[str]:
    """The printable character that represents each byte in byte-level vocabularies (GPT-2's): itself, or one from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    stand_ins = {byte: 256 + i for i, byte in enumerate(others)}
    return [chr(stand_ins.get(byte, byte)) for byte in range(256)]
