"""Which positional scheme carries a model to eight times its length? The same short extension under each of them.

Command:  make quickstart      (the points start from its base stage, in runs/quickstart)
          lcx sweep --config=configs/sweeps/schemes.py --workdir=runs/schemes
Hardware: 2 CPU cores.
"""

import runpy
from pathlib import Path

from lcx.positions.theta import critical_base, untrained_pairs
from lcx.research.recipe import defaults
from lcx.research.sweeps import param

QUICKSTART = runpy.run_path(str(Path(__file__).parents[1] / "quickstart.py"))
WORKDIR = "runs/quickstart"
TRAINED, LENGTH = QUICKSTART["BASE_LENGTH"], 2048


def get_config():
    """The base of every point: one short stage from the quickstart's base model, whose global layer gets the scheme."""
    quickstart = QUICKSTART["get_config"]()
    stage = {"seq_len": LENGTH, "steps": 25, "batch_size": 4, "optim": {"lr": 1e-3, "warmup_steps": 3}}
    config = defaults({"extend": stage}, **QUICKSTART["MODEL"])
    for key in ("data", "optim"):
        config[key] = quickstart[key]
    config.positions = {"local": quickstart.positions["local"], "default": quickstart.positions["global"]}
    config.init_from = base_checkpoint(quickstart)
    config.stages.extend.positions = {"default": "rope"}
    config.stages.extend.parts = {"needles": {"task": {"needles": LENGTH // 128, "queries": LENGTH // 128}}}
    config.evals.lengths = (TRAINED, 512, 1024, LENGTH)
    config.evals.items = 10
    config.evals.perplexity_tokens = 1 << 14
    config.checkpoint.every = None
    config.metrics.tensorboard = False
    config.monitor.enabled = False
    return config


def base_checkpoint(quickstart) -> str:
    """The checkpoint at the end of the quickstart's base stage."""
    order = list(quickstart.stage_order)
    steps = sum(quickstart.stages[name].steps for name in order[: order.index(quickstart.base_stage) + 1])
    return f"{WORKDIR}/checkpoints/{steps}"


def get_sweep():
    """A point for each scheme."""
    return param("stages.extend.positions.default", *specs())


def specs() -> list[str]:
    """Schemes for `LENGTH` tokens as text; theta and trained length stay the base model's unless named."""
    theta, head_dim = QUICKSTART["BASE_THETA"], QUICKSTART["MODEL"]["head_dim"]
    factor = LENGTH // TRAINED
    pairs = head_dim // 2
    turned = 1 - len(untrained_pairs(theta, head_dim, TRAINED)) / pairs
    near = TRAINED // 2
    group = -(-(LENGTH - near) // (TRAINED - near))
    return [
        "rope",
        f"linear:factor={factor}",
        f"ntk:factor={factor}",
        "dynamic:factor=2",
        f"yarn:factor={factor}",
        f"llama3:factor={factor},original_length={TRAINED}",
        f"rope:theta={critical_base(theta, TRAINED, LENGTH):.0f}",
        f"proportional:partial={turned:g}",  # only the pairs that completed a turn in training go on turning
        f"self_extend:window={near},group={group}",
        f"rerope:window={near}",
        f"dual_chunk:chunk={3 * TRAINED // 4}",
        "nope",
        "alibi",
    ]
