"""Which positional scheme carries a model to eight times its length? The same short extension under each of them.

Command:  make quickstart      (the points start from its base stage, in runs/quickstart)
          lcx sweep --config=configs/sweeps/schemes.py --workdir=runs/schemes
Hardware: 2 CPU cores.
Time:     24 minutes, 13 points of 34 to 394 seconds.
Result:   nope, the critical theta, rerope, p-RoPE and dynamic find 90% and more at 2,048, most others 76 to 82%; ntk less than
          half, alibi a fifth, and plain rope nothing (experiments/002_schemes).
"""

import runpy
from pathlib import Path

from lcx.positions.theta import critical_base, untrained_pairs
from lcx.recipes.sweeps import param

QUICKSTART = runpy.run_path(str(Path(__file__).parents[1] / "quickstart.py"))
TRAINED, LENGTH = QUICKSTART["BASE_LENGTH"], 2048


def get_config():
    """The base of every point: a short stage in which the global layer gets the scheme."""
    config = QUICKSTART["from_base"]((TRAINED, 512, 1024, LENGTH), seq_len=LENGTH, batch_size=4)
    config.stages.extend.positions = {"default": "rope"}
    config.stages.extend.parts = {"needles": {"task": {"needles": LENGTH // 128, "queries": LENGTH // 128}}}
    return config


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
