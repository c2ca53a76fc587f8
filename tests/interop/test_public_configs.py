"""config.json of real checkpoints: all that a family's models say is read, and what would change a result stops the import.

Facts of public checkpoints: their keys and values, without the sizes that all of a family have alike.
"""

import pytest

from lcx.core.errors import UserError
from lcx.interop import hf_config
from lcx.positions.rotary import Rope
from lcx.positions.scaling import Llama3, LongRope, Yarn

COMMON = {
    "transformers_version": "4.40.0", "torch_dtype": "bfloat16", "use_cache": True, "initializer_range": 0.02, "hidden_act": "silu",
    "attention_dropout": 0.0,
}  # fmt: skip


def sizes(vocab, hidden, inner, layers, heads, kv_heads, length):
    return {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": length,
    }  # fmt: skip


LLAMA = {
    **COMMON, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "pretraining_tp": 1, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "attention_bias": False, "rope_scaling": None,
}  # fmt: skip
LLAMA_2, LLAMA_3 = {**LLAMA, "bos_token_id": 1, "eos_token_id": 2}, {**LLAMA, "bos_token_id": 128000, "eos_token_id": 128001}
SCALED_3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
MISTRAL = {
    **COMMON, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
QWEN_2 = {
    **COMMON, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151645,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False,
}  # fmt: skip
QWEN_3 = {
    **COMMON, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128,
    "bos_token_id": 151643, "eos_token_id": 151645, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_scaling": None,
    "sliding_window": None, "use_sliding_window": False,
}  # fmt: skip
GEMMA_2 = {
    **COMMON, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096,
}  # fmt: skip
GEMMA_3 = {
    **COMMON, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
    "final_logit_softcapping": None, "head_dim": 256, "hidden_act": None, "hidden_activation": "gelu_pytorch_tanh",
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": 512, "sliding_window_pattern": 6,
}  # fmt: skip
PHI_3 = {
    **COMMON, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "bos_token_id": 1, "eos_token_id": 32000,
    "pad_token_id": 32000, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "attention_bias": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
MIXTRAL = {
    **COMMON, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
QWEN_3_MOE = {
    **QWEN_3, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "mlp_only_layers": [],
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001, "max_window_layers": 48,
}  # fmt: skip
FACTORS = {"long_factor": [1.0 + i / 10 for i in range(48)], "short_factor": [1.0] * 48}

PUBLIC = {
    "Llama-2-7b": {**LLAMA_2, **sizes(32000, 4096, 11008, 32, 32, 32, 4096)},
    "Llama-2-70b": {**LLAMA_2, **sizes(32000, 8192, 28672, 80, 64, 8, 4096)},
    "CodeLlama-7b": {**LLAMA_2, **sizes(32016, 4096, 11008, 32, 32, 32, 16384), "rope_theta": 1000000},
    "vicuna-7b-v1.5-16k": {
        **LLAMA_2, **sizes(32000, 4096, 11008, 32, 32, 32, 4096), "max_sequence_length": 16384,
        "rope_scaling": {"factor": 4.0, "type": "linear"}, "_name_or_path": "vicuna", "pad_token_id": 0,
    },
    "LLaMA-2-7B-32K": {
        **LLAMA_2, **sizes(32000, 4096, 11008, 32, 32, 32, 32768), "rope_scaling": {"factor": 8.0, "type": "linear"},
        "pad_token_id": 0,
    },
    "Yarn-Llama-2-7b-128k": {
        **LLAMA_2, **sizes(32000, 4096, 11008, 32, 32, 32, 4096), "_name_or_path": "model",
        "rope_scaling": {"factor": 32.0, "finetuned": True, "original_max_position_embeddings": 4096, "type": "yarn"},
        "auto_map": {"AutoConfig": "configuration_llama.LlamaConfig"}, "pad_token_id": 0,
    },
    "TinyLlama-1.1B": {**LLAMA_2, **sizes(32000, 2048, 5632, 22, 32, 4, 2048), "rope_theta": 10000.0},
    "deepseek-coder-6.7b": {
        **LLAMA, **sizes(32256, 4096, 11008, 32, 32, 32, 16384), "bos_token_id": 32013, "eos_token_id": 32014, "rope_theta": 100000,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
    },
    "Yi-6B-200K": {**LLAMA_2, **sizes(64000, 4096, 11008, 32, 32, 4, 200000), "rope_theta": 10000000.0, "pad_token_id": 0},
    "Meta-Llama-3-8B": {**LLAMA_3, **sizes(128256, 4096, 14336, 32, 32, 8, 8192), "rope_theta": 500000.0},
    "Llama-3.1-8B": {
        **LLAMA_3, **sizes(128256, 4096, 14336, 32, 32, 8, 131072), "rope_theta": 500000.0, "rope_scaling": SCALED_3,
        "mlp_bias": False,
    },
    "Llama-3.1-8B-Instruct": {
        **LLAMA_3, **sizes(128256, 4096, 14336, 32, 32, 8, 131072), "rope_theta": 500000.0, "rope_scaling": SCALED_3,
        "mlp_bias": False,
        "eos_token_id": [128001, 128008, 128009],
    },
    "Llama-3.2-1B": {
        **LLAMA_3, **sizes(128256, 2048, 8192, 16, 32, 8, 131072), "rope_theta": 500000.0, "rope_scaling": {**SCALED_3,
        "factor": 32.0},
        "mlp_bias": False, "head_dim": 64, "tie_word_embeddings": True,
    },
    "Llama-3.2-1B by unsloth": {
        **LLAMA_3, **sizes(128256, 2048, 8192, 16, 32, 8, 131072), "rope_theta": 500000.0, "rope_scaling": {**SCALED_3,
        "factor": 32.0},
        "mlp_bias": False, "head_dim": 64, "tie_word_embeddings": True, "unsloth_fixed": True, "unsloth_version": "2024.9",
        "pad_token_id": 128004,
    },
    "Llama-3-8B-Instruct-Gradient-1048k": {
        **LLAMA_3, **sizes(128256, 4096, 14336, 32, 32, 8, 1048576), "rope_theta": 3580165449.0, "_name_or_path": "a/b",
    },
    "Llama-3-8B-ProLong-512k-Base": {**LLAMA_3, **sizes(128256, 4096, 14336, 32, 32, 8, 524288), "rope_theta": 128000000.0},
    "SmolLM-360M": {
        **LLAMA, **sizes(49152, 960, 2560, 32, 15, 5, 2048), "bos_token_id": 0, "eos_token_id": 0, "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
    "SmolLM2-135M": {
        **LLAMA, **sizes(49152, 576, 1536, 30, 9, 3, 8192), "bos_token_id": 0, "eos_token_id": 0, "is_llama_config": True,
        "rope_interleaved": False, "rope_theta": 100000, "tie_word_embeddings": True,
    },
    "SmolLM2-135M-Instruct": {
        **LLAMA, **sizes(49152, 576, 1536, 30, 9, 3, 8192), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        "is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000, "tie_word_embeddings": True,
        
    },
    "a GGUF by transformers": {
        **LLAMA, **sizes(49152, 576, 1536, 30, 9, 3, 8192), "_model_name_or_path": "x.gguf", "unk_token_id": 0, "bos_token_id": 1,
        "rope_theta": 100000.0, "tie_word_embeddings": True,
    },
    "deepseek-llm-7b": {**LLAMA, **sizes(102400, 4096, 11008, 30, 32, 32, 4096), "bos_token_id": 100000, "eos_token_id": 100001},
    "Mistral-7B-v0.1": {**MISTRAL, **sizes(32000, 4096, 14336, 32, 32, 8, 32768), "rope_theta": 10000.0, "sliding_window": 4096},
    "Mistral-7B-Instruct-v0.3": {
        **MISTRAL, **sizes(32768, 4096, 14336, 32, 32, 8, 32768), "rope_theta": 1000000.0, "sliding_window": None,
    },
    "zephyr-7b-beta": {
        **MISTRAL, **sizes(32000, 4096, 14336, 32, 32, 8, 32768), "rope_theta": 10000.0, "sliding_window": 4096, "pad_token_id": 2,
        "_name_or_path": "data/zephyr",
    },
    "Mistral-Nemo-Base-2407": {
        **MISTRAL, **sizes(131072, 5120, 14336, 40, 32, 8, 128000), "head_dim": 128, "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "Qwen2-0.5B": {
        **QWEN_2, **sizes(151936, 896, 4864, 24, 14, 2, 131072), "max_window_layers": 24, "sliding_window": 131072,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-7B-Instruct": {
        **QWEN_2, **sizes(152064, 3584, 18944, 28, 28, 4, 32768), "max_window_layers": 28, "sliding_window": 131072,
        "tie_word_embeddings": False,
    },
    "Qwen2.5-7B": {
        **QWEN_2, **sizes(152064, 3584, 18944, 28, 28, 4, 131072), "max_window_layers": 28, "sliding_window": 131072,
        "tie_word_embeddings": False, "use_mrope": False,
    },
    "Qwen2.5-Coder with YaRN": {
        **QWEN_2, **sizes(152064, 3584, 18944, 28, 28, 4, 32768), "max_window_layers": 28, "sliding_window": 131072,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "DeepSeek-R1-Distill-Qwen-1.5B": {
        **QWEN_2, **sizes(151936, 1536, 8960, 28, 12, 2, 131072), "rope_theta": 10000, "max_window_layers": 21,
        "sliding_window": 4096,
        "use_mrope": False, "tie_word_embeddings": False,
    },
    "Qwen3-0.6B": {**QWEN_3, **sizes(151936, 1024, 3072, 28, 16, 8, 40960), "max_window_layers": 28, "tie_word_embeddings": True},
    "Qwen3-8B": {**QWEN_3, **sizes(151936, 4096, 12288, 36, 32, 8, 40960), "max_window_layers": 36, "tie_word_embeddings": False},
    "Qwen3-30B-A3B": {**QWEN_3_MOE, **sizes(151936, 2048, 6144, 48, 32, 4, 40960), "tie_word_embeddings": False},
    "gemma-2-2b": {**GEMMA_2, **sizes(256000, 2304, 9216, 26, 8, 4, 8192)},
    "gemma-2-9b": {**GEMMA_2, **sizes(256000, 3584, 14336, 42, 16, 8, 8192)},
    "gemma-3-1b-pt": {**GEMMA_3, **sizes(262144, 1152, 6912, 26, 4, 1, 32768)},
    "gemma-3-270m": {
        **GEMMA_3, **sizes(262144, 640, 2048, 18, 4, 1, 32768), "_sliding_window_pattern": 6, "use_bidirectional_attention": False,
        "layer_types": ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(18)],
    },
    "Phi-3-mini-4k-instruct": {
        **PHI_3, **sizes(32064, 3072, 8192, 32, 32, 32, 4096), "rope_scaling": None, "sliding_window": 2047,
        "_name_or_path": "Phi-3",
    },
    "Phi-3-mini-128k-instruct": {
        **PHI_3, **sizes(32064, 3072, 8192, 32, 32, 32, 131072), "sliding_window": 262144, "rope_scaling": {**FACTORS,
        "type": "longrope"},
    },
    "phi-4": {
        **PHI_3, **sizes(100352, 5120, 17920, 40, 40, 10, 16384), "original_max_position_embeddings": 16384, "rope_theta": 250000,
        "rope_scaling": None, "sliding_window": None, "bos_token_id": 100257, "eos_token_id": 100257, "pad_token_id": 100257,
    },
    "OLMo-2-1124-7B": {
        **COMMON, **sizes(100352, 4096, 11008, 32, 32, 32, 4096), "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False, "eos_token_id": 100257, "pad_token_id": 100277, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 500000, "tie_word_embeddings": False,
    },
    "Mixtral-8x7B-v0.1": {**MIXTRAL, **sizes(32000, 4096, 14336, 32, 32, 8, 32768)},
    "Mixtral-8x22B-v0.1": {**MIXTRAL, **sizes(32000, 6144, 16384, 56, 48, 8, 65536), "router_jitter_noise": 0.0},
    "SmolLM3-3B": {
        **COMMON, **sizes(128256, 2048, 11008, 36, 16, 4, 65536), "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": False, "mlp_bias": False, "bos_token_id": None, "eos_token_id": 128012, "pad_token_id": 128004,
        "layer_types": ["full_attention"] * 36, "max_window_layers": 28, "no_rope_layer_interval": 4,
        "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(36)], "pretraining_tp": 2, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False,
    },
    # Its text model, which has this as text_config.
    "Ministral-3-3B": {
        **sizes(131072, 3072, 9216, 26, 32, 8, 262144), "model_type": "ministral3", "head_dim": 128, "hidden_act": "silu",
        "attention_dropout": 0.0, "dtype": "bfloat16", "initializer_range": 0.02, "rms_norm_eps": 1e-5, "sliding_window": None,
        "tie_word_embeddings": True, "use_cache": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 11,
        "rope_parameters": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16384, "rope_theta": 1e6, "rope_type": "yarn", "type": "yarn",
        },
    },
}  # fmt: skip


def test_there_are_forty():
    assert len(PUBLIC) >= 40 and {values["model_type"] for values in PUBLIC.values()} == set(hf_config.FAMILIES)


@pytest.mark.parametrize("name", PUBLIC)
def test_is_read_as_it_is(name):
    values = PUBLIC[name]
    found = hf_config.read(values)
    model = found.model
    assert (model.vocab_size, model.model_dim, model.num_layers) == (
        values["vocab_size"], values["hidden_size"], values["num_hidden_layers"],
    )  # fmt: skip
    assert (model.num_heads, model.num_kv_heads) == (values["num_attention_heads"], values["num_key_value_heads"])
    assert found.length == values["max_position_embeddings"]
    rotary = {kind: scheme for kind, scheme in found.schemes.items() if isinstance(scheme, Rope)}
    scheme = rotary.get("global") or rotary["local"]
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    theta = values.get("rope_theta", scaling.get("rope_theta", found.family.theta))
    assert scheme.theta == theta
    kinds = {"yarn": Yarn, "llama3": Llama3, "longrope": LongRope}
    wanted = kinds.get(scaling.get("rope_type", scaling.get("type")))
    assert wanted is None or isinstance(scheme, wanted)
    if scaling.get("type") == "linear":
        assert scheme.factor == scaling["factor"]


def test_what_is_ignored_is_named():
    assert hf_config.read(PUBLIC["a GGUF by transformers"]).ignored == ("_model_name_or_path", "unk_token_id")
    assert hf_config.read(PUBLIC["SmolLM2-135M"]).ignored == ("is_llama_config",)
    assert hf_config.read(PUBLIC["vicuna-7b-v1.5-16k"]).ignored == ("max_sequence_length",)
    assert hf_config.read(PUBLIC["Llama-3.1-8B"]).ignored == ()


GENERATION = {
    "max_length": 20,
    "do_sample": False,
    "top_k": 50,
    "temperature": 1.0,
    "num_beams": 1,
    "pruned_heads": {},
    "torchscript": False,
}


def test_old_transformers_write_their_generation_options_into_it():
    found = hf_config.read({**PUBLIC["Llama-2-7b"], **GENERATION, "sep_token_id": None, "decoder_start_token_id": 5, "prefix": "x"})
    plain = hf_config.read(PUBLIC["Llama-2-7b"])
    assert found.model == plain.model and found.schemes == plain.schemes
    assert set(found.ignored) == {*GENERATION, "decoder_start_token_id", "prefix"} - {"pruned_heads"}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        # Qwen2.5-7B-Instruct-1M attends in chunks beyond its trained length.
        (
            "Qwen2.5-7B-Instruct", {"dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192}},
            "dual_chunk_attention_config=.* is not supported for qwen2",
        ),
        ("Llama-3.1-8B", {"attention_multiplier": 0.01}, "attention_multiplier=0.01 is not supported for llama"),
        ("Llama-2-7b", {"rope_interleaved": True}, "rope_interleaved=True is not supported; expected False"),
        ("Phi-3-mini-4k-instruct", {"attention_bias": True}, "attention_bias=True is not supported; expected False"),
        ("Mistral-7B-v0.1", {"mlp_bias": True}, "mlp_bias=True is not supported; expected False"),
        ("Llama-2-7b", {"pruned_heads": {"0": [1]}}, "pruned_heads=.* is not supported"),
        ("Qwen2.5-7B", {"use_mrope": True}, "use_mrope=True is not supported; expected False"),
        ("Llama-2-7b", {"quantization_config": {"bits": 4, "quant_method": "gptq"}},
        "use the original checkpoint before quantisation"),
        ("OLMo-2-1124-7B", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported for olmo2"),
        ("Llama-2-7b", {"embedding_multiplier": 12.0}, "embedding_multiplier=12.0 is not supported for llama"),
        ("Qwen3-30B-A3B", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported; expected 1"),
    ],
)  # fmt: skip
def test_what_would_change_a_result_stops_the_import(name, changes, message):
    with pytest.raises(UserError, match=message):
        hf_config.read({**PUBLIC[name], **changes})
