"""Writes `hf_frequencies.json`: rotary frequencies as transformers computes them, for the cases below.

Needs `transformers` and torch, not jax: `python tests/positions/make_hf_fixtures.py`. The committed file was generated with
transformers 5.23.0 and torch 2.13.0 (it names both). `test_hf.py` reads the file, and also calls `reference` where both are
installed.
"""

import json
import pathlib

FIXTURES = pathlib.Path(__file__).with_name("hf_frequencies.json")

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.01 * i for i in range(48)],
    "long_factor": [1.0 + 0.02 * i * i for i in range(48)],
    "original_max_position_embeddings": 4096,
}

# name: (rope_parameters, head_dim, max_position_embeddings, declared length)
CASES = {
    "default": ({"rope_type": "default", "rope_theta": 10000.0}, 128, 4096, 4096),
    "default-5e5": ({"rope_type": "default", "rope_theta": 5e5}, 128, 8192, 8192),
    "default-4.5e10": ({"rope_type": "default", "rope_theta": 4.52e10}, 128, 8192, 8192),
    "default-partial": ({"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}, 80, 2048, 2048),
    "linear": ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}, 64, 4096, 32768),
    "linear-partial": ({"rope_type": "linear", "rope_theta": 1e6, "factor": 2.5, "partial_rotary_factor": 0.5}, 64, 4096, 8192),
    "dynamic": ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, 128, 4096, 16384),
    "dynamic-short": ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, 128, 4096, 1024),
    "yarn": (
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 4096},
        128,
        16384,
        16384,
    ),
    "yarn-betas": (
        {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 32768,
            "beta_fast": 4.0,
            "beta_slow": 1.0,
            "truncate": False,
            "attention_factor": 1.25,
        },
        128,
        524288,
        524288,
    ),
    "yarn-deepseek": (
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
        },
        64,
        163840,
        163840,
    ),
    "yarn-no-factor": (
        {"rope_type": "yarn", "rope_theta": 5e5, "factor": None, "original_max_position_embeddings": 8192},
        128,
        65536,
        65536,
    ),
    "yarn-128x": (
        {"rope_type": "yarn", "rope_theta": 500.0, "factor": 128.0, "original_max_position_embeddings": 256},
        32,
        32768,
        32768,
    ),
    "longrope-short": ({**LONGROPE, "rope_theta": 10000.0}, 96, 131072, 4096),
    "longrope-long": ({**LONGROPE, "rope_theta": 10000.0}, 96, 131072, 131072),
    "longrope-attention": ({**LONGROPE, "rope_theta": 10000.0, "factor": 16.0, "attention_factor": 1.19}, 96, 65536, 65536),
    "llama3": (
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        128,
        131072,
        131072,
    ),
    "llama3-32": (
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        64,
        131072,
        131072,
    ),
    "proportional": ({"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}, 256, 32768, 32768),
    "proportional-factor": (
        {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.7, "factor": 4.0},
        64,
        8192,
        32768,
    ),
}


def reference(name: str) -> dict:
    """`inv_freq` and `attention_factor` of a case by transformers' own functions, in torch's float32."""
    from transformers import LlamaConfig, PhiConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

    parameters, head_dim, max_positions, length = CASES[name]
    sizes = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "max_position_embeddings": max_positions}
    if parameters["rope_type"] != "default":
        config = LlamaConfig(**sizes, head_dim=head_dim, rope_parameters=dict(parameters))
        inv_freq, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=length)
    elif "partial_rotary_factor" in parameters:
        inv_freq, factor = PhiRotaryEmbedding.compute_default_rope_parameters(PhiConfig(**sizes, rope_parameters=dict(parameters)))
    else:
        inv_freq, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(
            LlamaConfig(**sizes, head_dim=head_dim, rope_parameters=dict(parameters))
        )
    return {"inv_freq": [float(value) for value in inv_freq], "attention_factor": float(factor)}


def main() -> None:
    import torch
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    cases = {name: reference(name) for name in CASES}
    FIXTURES.write_text(json.dumps({"versions": versions, "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
