"""A decoder in NumPy and float64, one row at a time: rotary embeddings, grouped heads, sliding windows, gated feed-forward layers.

Legend: T tokens, N heads, H head dim.
"""

import numpy as np

from lcx.model.config import ModelConfig

MODEL = ModelConfig(
    model_dim=32, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, pattern=("local", "global"), window=40
)
THETA = 500.0


def normed(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + MODEL.norm_eps) * scale


def turned(x):
    """Rotary embedding of `[T, N, H]` as a product of complex numbers."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * THETA ** (-np.arange(half) / half)
    pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([pairs.real, pairs.imag], -1)


def forward(params, tokens, config=MODEL):
    """Scaled scores `[N, T, T]` of each layer, -inf where a query must not look, and the loss of each next token `[T - 1]`."""
    w = {name: {k: np.asarray(v["kernel"], np.float64) for k, v in params["layers"][name].items()} for name in ("attention", "mlp")}
    scales = {name: np.asarray(params["layers"][name]["scale"], np.float64) for name in ("pre_attention_norm", "pre_mlp_norm")}
    x, found = np.asarray(params["embed"]["embedding"], np.float64)[tokens], []
    distance = np.arange(len(tokens))[:, None] - np.arange(len(tokens))
    for i, kind in enumerate(config.layer_kinds):
        y = normed(x, scales["pre_attention_norm"][i])
        q, k, v = (np.einsum("td,dnh->tnh", y, w["attention"][name][i]) for name in ("query", "key", "value"))
        k, v = (np.repeat(z, config.num_heads // config.num_kv_heads, axis=1) for z in (k, v))
        logits = np.einsum("tnh,snh->nts", turned(q), turned(k)) * config.head_dim**-0.5
        logits[:, (distance < 0) | ((distance >= config.window) if kind == "local" else False)] = -np.inf
        found.append(logits)
        x = x + np.einsum("nts,snh,nhd->td", softmax(logits), v, w["attention"]["out"][i])
        y = normed(x, scales["pre_mlp_norm"][i])
        gate = y @ w["mlp"]["gate"][i]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["mlp"]["up"][i])) @ w["mlp"]["down"][i]
    x = normed(x, np.asarray(params["final_norm"]["scale"], np.float64)) @ np.asarray(params["head"]["kernel"], np.float64)
    return found, -np.log(softmax(x))[np.arange(len(tokens) - 1), tokens[1:]]


def softmax(logits):
    top = logits.max(-1, keepdims=True)
    powers = np.exp(logits - np.where(np.isfinite(top), top, 0))
    total = powers.sum(-1, keepdims=True)
    return powers / np.where(total == 0, 1, total)
