"""How an exported model is served: the commands of vLLM, llama.cpp and transformers, and what each of them does with its length.

What vLLM computes is read from its sources (vllm/config/model.py and the rotary embeddings, 2026): it takes the lowest length of
config.json, that of YaRN being the one before scaling, times the factor of every scaling but Llama 3's and LongRoPE's.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from lcx.core.errors import UserError
from lcx.interop import gguf_config
from lcx.interop.families import LENGTHS
from lcx.interop.hf_config import LENGTH

_SCALED_ALREADY = ("longrope", "su", "llama3")

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` may be."""


def rotary(values: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of the layers that see the whole context, from a config.json by `hf_config.write`."""
    found = values["rope_parameters"]
    return dict(found.get("full_attention", found))


def vllm_length(values: Mapping[str, Any]) -> int:
    """The most tokens that vLLM serves without being told to allow more, from a config.json by `hf_config.write`."""
    rope = rotary(values)
    kind, length = rope["rope_type"], min([values[LENGTH], *(values[key] for key in LENGTHS if isinstance(values.get(key), int))])
    if kind in _SCALED_ALREADY or "gemma3" in values["model_type"]:
        return length
    if kind == "yarn":
        length = rope["original_max_position_embeddings"]
    return int(length * rope.get("factor", 1.0))


def vllm(name: str, values: Mapping[str, Any], length: int) -> str:
    """vLLM's command for a folder of up to `length` tokens, and what to know of it."""
    most, rope = vllm_length(values), rotary(values)
    allow = "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 " if most < length else ""
    notes = [
        "`config.json` holds the rotary settings, so that no `--hf-overrides` is needed (vLLM has no `--rope-scaling` any more). "
        "Whoever overrides `rope_parameters` all the same repeats `rope_theta` in them: without it vLLM takes 10,000."
    ]
    match rope["rope_type"]:
        case "linear":
            notes.append(
                f"Keep `--max-model-len`: of linear scaling vLLM takes `{LENGTH}` for the length before it, and would offer "
                f"{most:,} tokens, more than the model was trained for."
            )
        case "longrope":
            trained = values.get("original_max_position_embeddings", 0)
            notes.append(f"Keep `--max-model-len`: of LongRoPE vLLM otherwise offers the {trained:,} tokens before the extension.")
        case "dynamic":
            notes.append(
                f"vLLM takes the frequencies of {most:,} tokens for texts of any length, where transformers and lcx take those of "
                "the text's own: answers differ."
            )
    if allow:
        notes.append(f"vLLM derives {most:,} tokens from `config.json`, and serves {length:,} only where it is allowed to.")
    return _block(f"{allow}vllm serve {shlex.quote(name)} --max-model-len {length}") + "\n\n" + "\n".join(notes)


def vllm_adapter(name: str, base: str, values: Mapping[str, Any], length: int, rank: int) -> str:
    """vLLM's command for an adapter on its base, whose own config.json says other positions and a lower length."""
    keys = ("rope_parameters", LENGTH, "original_max_position_embeddings")
    overrides = json.dumps({key: values[key] for key in keys if key in values})
    words = [
        "vllm", "serve", base, "--max-model-len", str(length), "--hf-overrides", overrides, "--enable-lora", "--max-lora-rank",
        str(next(most for most in _LORA_RANKS if most >= rank or most == _LORA_RANKS[-1])), "--lora-modules", f"{name}={name}",
    ]  # fmt: skip
    return (
        _block(" ".join(map(shlex.quote, words)))
        + "\n\nThe base's `config.json` says the positions before the extension, so that the new ones have to be given, "
        "`rope_theta` among them. vLLM takes low-rank matrices alone: where parameters were trained in full besides "
        "(`modules_to_save`), serve the whole model, which `lcx export` writes without `--format=peft`."
    )


def llama_server(name: str, values: Mapping[str, Any], length: int, checkpoint: str | None) -> str:
    """llama.cpp's command for a GGUF file, or with `checkpoint` how to write that file first; or why it cannot be written."""
    file, lines = name, []
    if checkpoint is not None:
        try:
            gguf_config.metadata(values)
        except UserError as error:
            return f"Not for llama.cpp: {error}."
        file = f"{name}.gguf"
        lines = [f"lcx export --checkpoint={shlex.quote(checkpoint)} --format=gguf --out={shlex.quote(file)}"]
    return (
        _block("\n".join([*lines, f"llama-server -m {shlex.quote(file)} -c {length}"]))
        + f"\n\nThe file says {length:,} tokens, above which llama.cpp's server does not go, whatever its rotary options say."
    )


def transformers(name: str, length: int, has_template: bool, adapter_of: str | None = None) -> str:
    """Python that loads a folder with transformers (and peft) and has it answer; it runs where the folder lies."""
    if adapter_of is None:
        lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", "", f"name = {name!r}"]
        lines.append('model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")')
    else:
        lines = ["from peft import PeftModel", "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer", ""]
        lines.append(f"name = {name!r}")
        lines.append("config = AutoConfig.from_pretrained(name)  # the new positions, which the base's own lacks")
        lines.append(f'base = AutoModelForCausalLM.from_pretrained({adapter_of!r}, config=config, dtype="auto")')
        lines.append("model = PeftModel.from_pretrained(base, name)")
    lines.append("tokenizer = AutoTokenizer.from_pretrained(name)")
    if has_template:
        lines.append('messages = [{"role": "user", "content": "What is a context window?"}]')
        lines.append(
            'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")'
        )
    else:
        lines.append('inputs = tokenizer("A context window is", return_tensors="pt")')
    lines.append("output = model.generate(**inputs, max_new_tokens=64)")
    lines.append('print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))')
    return _block("\n".join(lines), "python") + f"\n\nPrompt and answer may have {length:,} tokens together."


def _block(text: str, language: str = "") -> str:
    return f"```{language}\n{text}\n```"
