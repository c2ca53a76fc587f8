"""A tiny random Llama over bytes with a chat template, as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from lcx.interop import byte_tokenizer
from tests.interop import hf_models

TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
LENGTH = 512


def make(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Write the model; its turns end with `</s>`, its length is `LENGTH`."""
    hf_models.make("llama", folder, vocab_size=258, num_hidden_layers=1, max_position_embeddings=LENGTH, eos_token_id=257)
    byte_tokenizer.write(folder, bos=True, eos=True)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
