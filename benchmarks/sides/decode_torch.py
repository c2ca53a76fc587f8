"""The peer in the benchmark of generation: transformers' `generate` with its default cache and attention. Needs no lcx or jax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from decode_side import MODEL, THETA, Generate, prompts, serve, weights
from side import cores
from torch_side import llama_config

NAMES = {
    "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj", "out": "self_attn.o_proj",
    "up": "mlp.up_proj", "gate": "mlp.gate_proj", "down": "mlp.down_proj",
}  # fmt: skip


def model(length: int) -> torch.nn.Module:
    """Llama with the shared weights."""
    made = transformers.LlamaForCausalLM(llama_config(MODEL, length, THETA)).eval()
    w = {name: torch.from_numpy(x) for name, x in weights().items()}
    one = torch.ones(MODEL["model_dim"])
    state = {"model.embed_tokens.weight": w["embedding"], "lm_head.weight": w["head"].T, "model.norm.weight": one}
    for i in range(MODEL["num_layers"]):
        state |= {f"model.layers.{i}.{path}.weight": w[name][i].T for name, path in NAMES.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{i}.{norm}.weight"] = one
    made.load_state_dict(state)
    return made


def build(rows: int, length: int, new: int) -> tuple[Generate, dict[str, Any]]:
    """Greedy, on all cores."""
    torch.set_num_threads(cores())
    made, asked = model(length + new), torch.from_numpy(prompts(rows, length)).long()
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = None, 0

    @torch.inference_mode()
    def run(begun: Callable[[], None]) -> list[list[int]]:
        def heard(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            if tokens.shape[1] == length + 1:
                begun()
            return torch.zeros(rows, dtype=torch.bool)

        options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "stopping_criteria": [heard]}
        return made.generate(asked, **options)[:, length:].tolist()

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return run, {"parameters": sum(p.numel() for p in made.parameters()), "versions": versions}


if __name__ == "__main__":
    serve(build)
