"""Sixty small steps in two stages, with an evaluation: what is killed again and again."""

import runpy
from pathlib import Path

TINY = runpy.run_path(str(Path(__file__).parents[1] / "cli" / "tiny.py"))


def get_config():
    config = TINY["get_config"]()
    config.stages.base.steps, config.stages.longer.steps = 40, 20
    config.checkpoint.every = 10
    config.metrics.peak_flops = 1e11
    config.evals.tasks = ("needles", "perplexity")
    config.evals.lengths = (64, 128)
    config.evals.needle_items = 4
    config.evals.perplexity_tokens = 2048
    return config
