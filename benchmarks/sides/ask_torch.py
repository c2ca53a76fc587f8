"""The peer in the benchmark of evaluation: transformers' `generate`, with its default cache and attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from ask_side import Ask, serve
from side import cores


def build(case: dict[str, Any]) -> tuple[Ask, dict[str, Any]]:
    """Greedy, on all cores, `rows` prompts of the case at a time, padded on the left as transformers asks for."""
    torch.set_num_threads(cores())
    model = transformers.AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32).eval()
    tokenizer, rows_at_once = transformers.AutoTokenizer.from_pretrained(case["model"]), case["rows"]
    fill = tokenizer.eos_token_id

    @torch.inference_mode()
    def ask(prompts: Sequence[np.ndarray], new_tokens: int) -> list[str]:
        texts = []
        for first in range(0, len(prompts), rows_at_once):
            here = prompts[first : first + rows_at_once]
            width = max(map(len, here))
            ids = torch.tensor(np.stack([np.pad(row, (width - len(row), 0), constant_values=fill) for row in here])).long()
            seen = torch.tensor(np.stack([np.arange(width) >= width - len(row) for row in here])).long()
            out = model.generate(ids, attention_mask=seen, max_new_tokens=new_tokens, do_sample=False, pad_token_id=fill)
            texts += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        return texts

    return ask, {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}


if __name__ == "__main__":
    serve(build)
