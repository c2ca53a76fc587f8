"""Writes `hf_experts.json`: one layer's mixture of experts, its gradients and its balance as transformers computes them.

Needs `transformers` and torch, not jax: `python tests/model/make_hf_experts.py`. The committed file was generated with the versions
that it names. `test_experts.py` reads the file, and also calls `reference` where both are installed.

Legend: B batch, T tokens, D model, F feed-forward, E experts, K experts of a token.
"""

import json
import pathlib

import numpy as np

FIXTURES = pathlib.Path(__file__).with_name("hf_experts.json")

B, T, D, F, E, K = 2, 5, 8, 6, 4, 2

# name: whether the weights of a token's experts are normalized
CASES = {"mixtral": True, "qwen3_moe": False, "qwen3_moe, normalized": True}


def problem():
    """Random float32 inputs: x and its output's cotangent `[B, T, D]`, a mask `[B, T]`, and kernels as lcx stores them."""
    rng = np.random.default_rng(0)
    shapes = {"x": (B, T, D), "cotangent": (B, T, D), "router": (D, E), "up": (E, D, F), "gate": (E, D, F), "down": (E, F, D)}
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return values, (np.arange(T)[None] < np.array([[T], [T - 2]])).astype(np.float32)


def reference(name):
    """The block's output, the gradient of its product with the cotangent for x and every kernel, and its load-balancing loss."""
    import torch
    from transformers import MixtralConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes = dict(hidden_size=D, num_experts_per_tok=K, num_hidden_layers=1, experts_implementation="eager")
    if name == "mixtral":
        block = MixtralSparseMoeBlock(MixtralConfig(**sizes, intermediate_size=F, num_local_experts=E))
    else:
        config = Qwen3MoeConfig(**sizes, moe_intermediate_size=F, num_experts=E, norm_topk_prob=CASES[name])
        block = Qwen3MoeSparseMoeBlock(config)
    values, mask = problem()
    given = {key: torch.tensor(value) for key, value in values.items()}
    with torch.no_grad():
        block.gate.weight.copy_(given["router"].T)
        block.experts.gate_up_proj.copy_(torch.cat([given["gate"], given["up"]], dim=-1).mT)
        block.experts.down_proj.copy_(given["down"].mT)
    x = given["x"].requires_grad_()
    y = block(x)
    y.backward(given["cotangent"])
    gate, up = block.experts.gate_up_proj.grad.mT.split(F, dim=-1)
    logits = block.gate(x)[0]
    found = {
        "y": y, "x": x.grad, "router": block.gate.weight.grad.T, "up": up, "gate": gate, "down": block.experts.down_proj.grad.mT,
        "balance": load_balancing_loss_func((logits,), E, K), "balance, masked": load_balancing_loss_func(
            (logits,), E, K, torch.tensor(mask)
        ),
    }  # fmt: skip
    return {key: value.detach().double().numpy().tolist() for key, value in found.items()}


def main():
    import torch
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    FIXTURES.write_text(json.dumps({"versions": versions, **{name: _rounded(reference(name)) for name in CASES}}) + "\n")


def _rounded(value):
    """Nine digits, which tell all float32 numbers apart."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else float(f"{value:.9g}")


if __name__ == "__main__":
    main()
