"""Conversion between the metadata of a GGUF file and the config.json that `hf_config` reads, in both directions.

Keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What llama.cpp does not read from a file but derives
from the architecture (Gemma's query scale, the order of its windows) is derived here too, and a model that differs is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lcx.core.console import warn
from lcx.core.errors import UserError
from lcx.core.gguf import Gguf
from lcx.data.tokenizers.gguf_vocab import PREFIX, end_ids

LLAMA_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""Hugging Face's module -> GGUF's; those of layers without `model.layers.<n>.` and `blk.<n>.`."""

_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GEMMA = {
    **LLAMA_TENSORS,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_PHI3 = {**LLAMA_TENSORS, "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
"""Tensors of divisors, one for each rotary pair; no parameters."""


@dataclasses.dataclass(frozen=True)
class Arch:
    """An architecture of GGUF: its `model_type` in Hugging Face and what the two formats do differently.

    `turned`: rows of queries and keys of a head are stored as they rotate, in neighbouring pairs (Hugging Face: a pair is half a
    head apart). `offset` is added to the weights of norms. `every`: each `every`-th layer sees everything, the others a window; 0
    without windows. `divisors`: which tensors of divisors llama.cpp reads. `large` is the number of layers at which it scales
    queries by model dim / heads in place of the head dim. `tempered`: queries are multiplied as Ministral 3's, and YaRN's factor
    is read as a ratio of two. `values` are further keys of config.json.
    """

    model_type: str
    tensors: Mapping[str, str] = dataclasses.field(default_factory=lambda: LLAMA_TENSORS)
    turned: bool = False
    offset: float = 0.0
    every: int = 0
    divisors: tuple[str, ...] = ()
    partial: bool = False
    large: int = 0
    tempered: bool = False
    activation: str = "silu"
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)


ARCHS: dict[str, Arch] = {
    "llama": Arch("llama", turned=True, divisors=(FREQS, LONG, SHORT)),
    "mistral3": Arch("ministral3", turned=True, divisors=(FREQS, LONG, SHORT), tempered=True, values={"sliding_window": None}),
    "qwen2": Arch("qwen2", values={"use_sliding_window": False}),
    "qwen3": Arch("qwen3", {**LLAMA_TENSORS, **_QK_NORMS}, values={"use_sliding_window": False}),
    "gemma2": Arch("gemma2", _GEMMA, offset=1.0, every=2, large=46, activation="gelu_pytorch_tanh"),
    "gemma3": Arch("gemma3_text", {**_GEMMA, **_QK_NORMS}, offset=1.0, every=6, large=62, activation="gelu_pytorch_tanh"),
    "phi3": Arch("phi3", _PHI3, divisors=(LONG, SHORT), partial=True),
}
"""`general.architecture` -> what it means."""

WRITTEN = {**{arch.model_type: name for name, arch in ARCHS.items()}, "mistral": "llama"}
"""`model_type` -> the architecture as which it is written; Mistral without windows is a Llama."""


class Metadata:
    """The keys of one file, looked up with the architecture in front."""

    def __init__(self, found: Gguf):
        self.found, self.where = found, str(found.path)
        self.name = found.metadata.get("general.architecture")
        if self.name not in ARCHS:
            raise UserError(
                f"{self.where}: general.architecture={self.name!r} is not supported; lcx reads GGUF files of {', '.join(ARCHS)}"
            )
        self.arch = ARCHS[self.name]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `<architecture>.<key>`; of an array that is the same for all layers, its only value."""
        value = self.found.metadata.get(f"{self.name}.{key}", default)
        if isinstance(value, list) and key != "attention.sliding_window_pattern":
            if len(set(value)) != 1:
                raise UserError(f"{self.where}: {self.name}.{key} differs between layers, which lcx does not support")
            value = value[0]
        return _short(value) if isinstance(value, float) else value

    def needs(self, key: str, kind: type = int) -> Any:
        """The value of a key; raises `UserError` without it, and if it is not of the type."""
        value = self.get(key)
        if not isinstance(value, kind):
            raise UserError(
                f"{self.where}: {self.name}.{key} is {'missing' if value is None else repr(value)}; expected {kind.__name__}"
            )
        return value


def arch(found: Gguf) -> Arch:
    """The architecture of a file; raises `UserError` for others than `ARCHS`."""
    return Metadata(found).arch


def values(found: Gguf) -> dict[str, Any]:
    """config.json of a GGUF file; raises `UserError` for what lcx does not compute."""
    data = Metadata(found)
    arch = data.arch
    if data.get("expert_count"):
        raise UserError(f"{data.where}: mixtures of experts are not read from GGUF; use the model's Hugging Face folder")
    embedding = found.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{data.where} has no token_embd.weight, so it is not a language model")
    D, N, L = (data.needs(key) for key in ("embedding_length", "attention.head_count", "block_count"))
    H = data.get("attention.key_length", D // max(N, 1))
    if (width := data.get("attention.value_length", H)) != H:
        raise UserError(f"{data.where}: keys have {H} dims and values {width}, which lcx does not support")
    length = data.needs("context_length")
    config: dict[str, Any] = {
        "model_type": arch.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": D,
        "intermediate_size": data.needs("feed_forward_length"),
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": data.get("attention.head_count_kv", N),
        "head_dim": H,
        "max_position_embeddings": length,
        "rms_norm_eps": data.needs("attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": "output.weight" not in found.tensors,
        **arch.values,
    }
    if arch.every:
        config |= _windows(data, L)
        config["hidden_activation"] = arch.activation
        config["query_pre_attn_scalar"] = D // N if arch.large == L else H
        for key, default in (("attn", 50.0), ("final", 30.0)):
            cap = data.get(f"{key}_logit_softcapping", default if data.name == "gemma2" else None)
            config[f"{key}_logit_softcapping"] = cap or None
    else:
        config["hidden_act"] = arch.activation
        window = data.get("attention.sliding_window")
        if data.name == "phi3":
            config["sliding_window"] = window or None
        elif window:
            raise UserError(f"{data.where}: {data.name}.attention.sliding_window={window} is not supported for this architecture")
    if data.name == "llama":
        config["attention_bias"] = "blk.0.attn_output.bias" in found.tensors
        config["mlp_bias"] = "blk.0.ffn_down.bias" in found.tensors
    config |= _rope_values(data, H, length)
    if arch.tempered and "llama_4_scaling_beta" not in config.get("rope_scaling", {}):
        # Without a temperature the graph of llama.cpp is Mistral's.
        config["model_type"] = "mistral"
    ends = end_ids(found.metadata)
    config["bos_token_id"] = found.metadata.get(f"{PREFIX}bos_token_id")
    config["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    config["pad_token_id"] = found.metadata.get(f"{PREFIX}padding_token_id")
    return config


def _windows(data: Metadata, layers: int) -> dict[str, Any]:
    """Which layers have a window: as the file says, or else in the architecture's order."""
    window = data.get("attention.sliding_window")
    if not window:
        raise UserError(f"{data.where}: {data.name}.attention.sliding_window is missing; expected a number of tokens")
    pattern = data.get("attention.sliding_window_pattern", data.arch.every)
    local = pattern if isinstance(pattern, list) else [bool(pattern) and (i + 1) % pattern != 0 for i in range(layers)]
    kinds = ["sliding_attention" if one else "full_attention" for one in local]
    return {"sliding_window": window, "layer_types": kinds}


def _rope_values(data: Metadata, H: int, length: int) -> dict[str, Any]:
    """Rotary keys of config.json."""
    theta = float(data.get("rope.freq_base", 10000.0))
    config: dict[str, Any] = {"rope_theta": theta}
    turning = data.get("rope.dimension_count", H)
    if turning != H:
        config["partial_rotary_factor"] = turning / H
    if data.name == "gemma3":
        config["rope_local_base_freq"] = float(data.get("rope.freq_base_swa", 10000.0))
    if data.get("rope.scaling.yarn_log_multiplier") and not data.arch.tempered:
        raise UserError(f"{data.where}: {data.name}.rope.scaling.yarn_log_multiplier is not supported")
    scaling = _scaling(data, theta, turning, length)
    if data.arch.tempered and (scale := data.get("attention.temperature_scale")):
        # llama.cpp has one length for both.
        trained = data.get("rope.scaling.original_context_length", length)
        scaling = {"rope_type": "default", **(scaling or {}), "llama_4_scaling_beta": scale}
        if scaling["rope_type"] == "llama3" and (other := scaling["original_max_position_embeddings"]) != trained:
            raise UserError(
                f"{data.where}: {FREQS} has wavelengths cut at {other}, and queries grow from {trained} on; expected one length"
            )
        scaling["original_max_position_embeddings"] = trained
    if scaling is not None:
        config["rope_scaling"] = scaling
        if scaling["rope_type"] == "longrope":
            config["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return config


def _scaling(data: Metadata, theta: float, turning: int, length: int) -> dict[str, Any] | None:
    kind = data.get("rope.scaling.type")
    factor = data.get("rope.scaling.factor") or data.get("rope.scale_linear")
    trained = data.get("rope.scaling.original_context_length", length)
    gain = data.get("rope.scaling.attn_factor", 1.0) * data.get("rope.scaling.yarn_attn_factor", 1.0)
    if FREQS in data.found.tensors:
        if FREQS not in data.arch.divisors:
            raise UserError(f"{data.where}: {FREQS} is not supported for {data.name}")
        return llama3(divisors(data.found, FREQS, turning // 2), theta, turning)
    if LONG in data.found.tensors and LONG in data.arch.divisors:
        if factor not in (None, 0, 1.0):
            raise UserError(f"{data.where}: {data.name}.rope.scaling.factor={factor} beside {LONG} would scale twice")
        lists = {key: divisors(data.found, name, turning // 2) for key, name in (("short_factor", SHORT), ("long_factor", LONG))}
        scaling = {"rope_type": "longrope", **lists, "attention_factor": gain, "original_max_position_embeddings": trained}
        return scaling | {"factor": max(1.0, length / trained)}
    if kind in (None, "none", "linear") and (kind != "linear" or factor):
        return None if factor in (None, 0, 1.0) or kind == "none" else {"rope_type": "linear", "factor": float(factor)}
    if kind != "yarn":
        raise UserError(f"{data.where}: {data.name}.rope.scaling.type={kind!r} is not supported without its factors")
    if (mixed := data.get("rope.scaling.yarn_ext_factor", 1.0)) != 1.0:
        raise UserError(f"{data.where}: {data.name}.rope.scaling.yarn_ext_factor={mixed} is not supported; expected 1.0")
    scaling = {"rope_type": "yarn", "factor": float(factor or 1.0), "original_max_position_embeddings": trained}
    scaling |= {
        f"beta_{one}": float(data.get(f"rope.scaling.yarn_beta_{one}", usual)) for one, usual in (("fast", 32), ("slow", 1))
    }
    multiplier = data.get("rope.scaling.yarn_log_multiplier")
    if multiplier and gain == 1:
        return {**scaling, "mscale": 1.0, "mscale_all_dim": multiplier}
    if multiplier:
        raise UserError(f"{data.where}: {data.name}.rope.scaling.attn_factor={gain} beside yarn_log_multiplier is not supported")
    # llama.cpp multiplies by this beside the factor that YaRN implies.
    return scaling if gain == 1 else {**scaling, "attention_factor": gain * _yarn_gain(scaling["factor"])}


def _yarn_gain(factor: float) -> float:
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def divisors(found: Gguf, name: str, pairs: int) -> list[float]:
    """The numbers of a tensor of divisors; raises `UserError` unless it has one for each rotary pair."""
    place = found.tensors.get(name)
    if place is None or place.kind != 0 or place.shape != (pairs,):
        what = "missing" if place is None else f"{place.shape} of type {place.kind}"
        raise UserError(f"{found.path}: {name} is {what}; expected {pairs} float32 numbers, one for each rotary pair")
    return [_short(float(one)) for one in place.open()]


def llama3(factors: Sequence[float], theta: float, dim: int) -> dict[str, Any]:
    """`rope_scaling` that divides the frequencies by `factors`, one for each of `dim / 2` pairs.

    Llama 3's rule (`positions.scaling.Llama3`) where it yields these divisors; it has one degree of freedom too many, so its low
    factor is taken as 1. Otherwise a "longrope" with the divisors themselves.
    """
    most = max(factors)
    waves = np.array([2 * math.pi * theta ** (2 * i / dim) for i in range(dim // 2)])
    wanted = np.array(factors)
    tried = [(8192, 4.0)]
    between = [i for i, one in enumerate(factors) if 1 < one < most]
    if between and most > 1:
        # 1 / divisor is linear in 1 / wavelength between the two ends.
        smooth = (1 / wanted[between] - 1 / most) / (1 - 1 / most)
        i, x = between[-1], smooth[-1]
        tried.append((round(float((1 + 3 * x) * waves[i])), 4.0))
        if len(between) > 1:
            slope, start = np.polyfit(1 / waves[between], smooth, 1)
            if start < 0:
                tried.append((round(slope * -1 / start), _short(1 - 1 / start)))
    for trained, high in tried:
        smooth = np.clip((trained / waves - 1) / (high - 1), 0, 1)
        if np.allclose(1 / (smooth + (1 - smooth) / most), wanted, rtol=1e-6, atol=0):
            scaling: dict[str, Any] = {"rope_type": "llama3", "factor": most, "low_freq_factor": 1.0, "high_freq_factor": high}
            return scaling | {"original_max_position_embeddings": trained}
    lists = {key: list(factors) for key in ("short_factor", "long_factor")}
    return {"rope_type": "longrope", **lists, "factor": 1.0, "attention_factor": 1.0, "original_max_position_embeddings": 8192}


def metadata(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys of a GGUF file for a config.json by `hf_config.write`, without the tokenizer's, and tensors of divisors by name.

    Raises `UserError` for what llama.cpp does not read from a file.
    """
    name = WRITTEN.get(config["model_type"])
    if name is None:
        raise UserError(
            f"GGUF is written for {', '.join(WRITTEN)}, not for {config['model_type']}; export a Hugging Face folder instead"
        )
    arch = ARCHS[name]
    D, N, H, L = (config[key] for key in ("hidden_size", "num_attention_heads", "head_dim", "num_hidden_layers"))
    keys: dict[str, Any] = {
        "block_count": L,
        "context_length": config["max_position_embeddings"],
        "embedding_length": D,
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": N,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": H,
        "attention.value_length": H,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "vocab_size": config["vocab_size"],
    }
    act = config.get("hidden_activation") or config.get("hidden_act")
    if act != arch.activation:
        raise UserError(f"llama.cpp computes {name} with the activation {arch.activation}, and this model has {act}")
    window = config.get("sliding_window")
    if arch.every:
        _check_windows(name, arch, config)
        keys["attention.sliding_window"] = window
        scale = D // N if arch.large == L else H
        if config["query_pre_attn_scalar"] != scale:
            asked = config["query_pre_attn_scalar"]
            raise UserError(f"llama.cpp takes query_pre_attn_scalar={scale} for {name} of {L} layers, and this model has {asked}")
        caps = {key: config.get(f"{key}_logit_softcapping") for key in ("attn", "final")}
        if name == "gemma3" and any(caps.values()) or name == "gemma2" and not all(caps.values()):
            raise UserError(
                f"llama.cpp computes {name} {'with' if name == 'gemma2' else 'without'} soft caps, and this model differs"
            )
        keys |= {f"{key}_logit_softcapping": float(cap) for key, cap in caps.items() if cap}
    elif window and name == "phi3":
        keys["attention.sliding_window"] = window
        warn(f"llama.cpp computes phi3 without its window of {window:,} tokens, so longer texts differ there")
    elif window and config.get("use_sliding_window", True):
        raise UserError(f"llama.cpp computes {name} without sliding windows, and this model has one of {window} tokens")
    rope, tensors = _rope_keys(name, arch, config)
    general = {"general.architecture": name, "general.type": "model"}
    return {**general, **{f"{name}.{key}": value for key, value in {**keys, **rope}.items()}}, tensors


def _check_windows(name: str, arch: Arch, config: Mapping[str, Any]) -> None:
    usual = ["full_attention" if (i + 1) % arch.every == 0 else "sliding_attention" for i in range(config["num_hidden_layers"])]
    if config["layer_types"] != usual:
        raise UserError(
            f"llama.cpp lets each {arch.every}th layer of {name} see everything, and this model has another order of layers"
        )


def _rope_keys(name: str, arch: Arch, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    given = config["rope_parameters"]
    keys: dict[str, Any] = {}
    if "full_attention" in given:
        local = given["sliding_attention"]
        if local["rope_type"] != "default":
            raise UserError(
                f"llama.cpp computes layers with a window of {name} with plain rotary positions, not {local['rope_type']}"
            )
        given, keys["rope.freq_base_swa"] = given["full_attention"], float(local["rope_theta"])
    H, kind = config["head_dim"], given["rope_type"]
    turning = round(H * given.get("partial_rotary_factor", 1.0))
    if turning != H and not arch.partial:
        raise UserError(f"llama.cpp rotates all {H} dims of a head of {name}, and this model {turning}")
    keys |= {"rope.freq_base": float(given["rope_theta"]), "rope.dimension_count": turning}
    writer = _WRITERS.get(kind)
    used = {"rope_type", "rope_theta", "partial_rotary_factor", "factor", *_USED.get(kind, ())}
    if arch.tempered:
        keys["attention.temperature_scale"] = float(given["llama_4_scaling_beta"])
        keys["rope.scaling.original_context_length"] = given["original_max_position_embeddings"]
        used |= {"llama_4_scaling_beta", "original_max_position_embeddings"}
        if kind == "yarn" and given.get("mscale") == 1 and given.get("mscale_all_dim"):
            keys["rope.scaling.yarn_log_multiplier"] = float(given["mscale_all_dim"])
            used |= {"mscale", "mscale_all_dim"}
    if writer is None or (other := sorted(set(given) - used)):
        what = f"rope_type={kind!r}" if writer is None else f"{other[0]}={given[other[0]]!r} of rope_type={kind!r}"
        raise UserError(f"llama.cpp has no {what}; it reads {', '.join(_WRITERS)}")
    found, tensors = writer(given, turning)
    if missing := sorted(set(tensors) - set(arch.divisors)):
        raise UserError(f"llama.cpp has no rope_type={kind!r} for {name} ({missing[0]})")
    return {**keys, **found}, tensors


def _of_yarn(given: Mapping[str, Any], dim: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    factor = float(given["factor"])
    keys = {"type": "yarn", "factor": factor, "original_context_length": given["original_max_position_embeddings"]}
    keys |= {f"yarn_beta_{one}": float(given[f"beta_{one}"]) for one in ("fast", "slow")}
    if (gain := given.get("attention_factor")) is not None:
        keys["attn_factor"] = gain / _yarn_gain(factor)
    return _scaled(keys), {}


def _of_longrope(given: Mapping[str, Any], dim: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    factor, trained = float(given["factor"]), given["original_max_position_embeddings"]
    usual = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    # With a factor llama.cpp would divide by it once more.
    keys = {"type": "longrope", "original_context_length": trained, "attn_factor": float(given.get("attention_factor", usual))}
    return _scaled(keys), {LONG: np.float32(given["long_factor"]), SHORT: np.float32(given["short_factor"])}


def _of_llama3(given: Mapping[str, Any], dim: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    low, high, factor = (float(given[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    waves = np.array([2 * math.pi * given["rope_theta"] ** (2 * i / dim) for i in range(dim // 2)])
    smooth = np.clip((given["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    # The factor alone would make llama.cpp divide once more.
    return {}, {FREQS: np.float32(1 / (smooth + (1 - smooth) / factor))}


def _scaled(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {f"rope.scaling.{key}": value for key, value in keys.items()}


_WRITERS: dict[str, Callable[[Mapping[str, Any], int], tuple[dict[str, Any], dict[str, np.ndarray]]]] = {
    "default": lambda given, dim: ({}, {}),
    "linear": lambda given, dim: (_scaled({"type": "linear", "factor": float(given["factor"])}), {}),
    "yarn": _of_yarn,
    "llama3": _of_llama3,
    "longrope": _of_longrope,
}
"""Hugging Face's `rope_type` -> keys and tensors of divisors, for settings and the number of rotary dims."""

_USED = {
    "yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "longrope": ("original_max_position_embeddings", "short_factor", "long_factor", "attention_factor"),
}
"""What each writer reads beside theta and factor."""


def _short(x: float) -> float:
    """The shortest decimal that is this number in float32, which is what a file holds."""
    return float(str(np.float32(x)))
