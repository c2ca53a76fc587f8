"""128 times the trained context on a laptop: 256 to 32,768 bytes in stages, what 8K to 1M is for a large model.

Command:  lcx run --config=configs/laptop_128x.py --workdir=runs/laptop_128x
Hardware: 2 CPU cores.
Time:     34 minutes on a machine that other work kept busy (with 90 steps fewer at 1,024 and 4,096 than now).
Result:   needles at 256 / 1,024 / 4,096 / 16,384 / 32,768: 98 / 98 / 100 / 99 / 97%, before the extension 86 / 14 / 1 / 0 / 0%;
          held-out perplexity 5.72 at 256 and 5.58 at 32,768, before the extension 6.34 and 6.48.
"""

import runpy
from pathlib import Path

QUICKSTART = runpy.run_path(str(Path(__file__).parent / "quickstart.py"))
BASE = QUICKSTART["BASE"]


def get_config():
    """The quickstart's recipe with two stages more."""
    config = QUICKSTART["recipe"](stages())
    config.base_stage = BASE
    config.evals.lengths = (256, 1024, 4096, 16384, 32768)
    config.evals.perplexity_tokens = 1 << 17
    config.evals.tokens_per_forward = 1 << 15
    return config


def stages() -> dict:
    """Each stage of the extension takes the critical base of its length."""
    extension = QUICKSTART["extension"]
    return {
        **QUICKSTART["stages"](),
        "extend_16384": extension(64, 16384, batch_size=1, steps=60),
        "extend_32768": extension(128, 32768, batch_size=1, steps=50),
    }
