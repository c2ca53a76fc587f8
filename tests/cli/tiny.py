"""The smallest config with two stages, for the command line."""

from lcx.recipes.recipe import defaults

STAGES = {
    "base": {"seq_len": 64, "steps": 2, "batch_size": 8},
    "longer": {"seq_len": 128, "steps": 2, "batch_size": 8, "positions": {"default": 400.0}},
}


def get_config():
    sizes = {"model_dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 32}
    config = defaults(STAGES, **sizes)
    config.positions = {"default": {"name": "rope", "theta": 100.0}}
    source = {"kind": "stdlib", "path": "", "limit_bytes": 300_000}
    config.data.parts = {"text": {"kind": "text", "weight": 1.0, "source": source, "packing": {"method": "best_fit"}}}
    config.monitor.enabled = False
    config.checkpoint.every = None
    config.metrics.writers = "jsonl"
    return config
