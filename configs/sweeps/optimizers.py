"""AdamW or Muon? The whole quickstart, base and extension, under each at equal tokens, with two seeds.

Command:  lcx sweep --config=configs/sweeps/optimizers.py --workdir=runs/optimizers
Hardware: 2 CPU cores.
Time:     about half an hour, 4 points of 5 to 9 minutes.
Result:   perplexity at 4,096 of 4.97 with Muon, 5.32 with AdamW; needles alike (experiments/009_optimizers).

Muon's steps are scaled to the size of AdamW's, so that both take the quickstart's learning rates as they are.
"""

import runpy
from pathlib import Path

from lcx.recipes.sweeps import param, prod

QUICKSTART = runpy.run_path(str(Path(__file__).parents[1] / "quickstart.py"))


def get_config():
    """The quickstart, its extended model evaluated alone."""
    config = QUICKSTART["get_config"]()
    config.base_stage = None
    config.evals.zero_shot = ()
    config.metrics.writers = "jsonl"
    config.monitor.enabled = False
    return config


def get_sweep():
    """Each optimizer with each seed."""
    return prod(param("seed", 0, 1), param("optim.name", "adamw", "muon"))
