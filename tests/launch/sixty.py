"""Sixty small steps in two stages, with an evaluation: what is killed again and again."""

from lcx.recipes.recipe import defaults

STAGES = {
    "base": {"seq_len": 64, "steps": 40, "batch_size": 8},
    "longer": {"seq_len": 128, "steps": 20, "batch_size": 8, "positions": {"default": 400.0}},
}


def get_config():
    sizes = {"model_dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 32}
    config = defaults(STAGES, **sizes)
    config.positions = {"default": {"name": "rope", "theta": 100.0}}
    source = {"kind": "stdlib", "path": "", "limit_bytes": 300_000}
    config.data.parts = {"text": {"kind": "text", "weight": 1.0, "source": source, "packing": {"method": "best_fit"}}}
    config.monitor.enabled = False
    config.checkpoint.every = 10
    config.metrics.writers = "jsonl"
    config.metrics.peak_flops = 1e11
    config.evals.tasks = ("needles", "perplexity")
    config.evals.lengths = (64, 128)
    config.evals.needle_items = 4
    config.evals.perplexity_tokens = 2048
    return config
