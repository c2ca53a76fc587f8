"""A model trained from scratch at 256 bytes, extended in stages to 4,096, with needles found over the whole length.

Command:  make quickstart      (lcx run --config=configs/quickstart.py --workdir=runs/quickstart)
Hardware: 2 CPU cores.
Time:     5 to 9 minutes after installation, by machine.
Result:   needles found at 256 / 512 / 1,024 / 2,048 / 4,096: 98 / 97 / 96 / 100 / 100%, before the extension 86 / 45 / 14 / 4 / 1%
          (on another machine a point or two more or less);
          held-out perplexity a byte 5.39 at 256 and 5.30 at 4,096, before the extension 6.06 and 6.07.
          With a distribution's Python, which has a third of the text: 97 / 96 / 97 / 99 / 95%, before 88 / 35 / 9 / 2 / 0%;
          perplexity 6.10 and 5.98.
"""

from lcx.positions.theta import critical_base
from lcx.recipes.recipe import defaults, part, variant_of

WORKDIR = "runs/quickstart"
BASE, BASE_LENGTH, BASE_THETA = "base_256", 256, 350.0
"""A theta as small as the trained length asks for: with 10,000 the model finds half its needles at four times that length as it is,
and there is less of an extension to see."""
MODEL = dict(
    model_dim=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32, mlp_dim=256, pattern=("local", "global"), window=16
)


def get_config(variant: str = ""):
    """The recipe; the variant `smoke` runs every part of it in a minute or two, with too few steps to learn."""
    config = recipe(stages())
    config.base_stage = BASE
    config.evals.zero_shot = ("linear", "ntk", "yarn", "rope:theta=critical")
    if variant_of(variant, "smoke"):
        smoke(config)
    return config


def recipe(stages: dict):
    """Model, positions, optimizer and data, for any stages."""
    config = defaults(stages, **MODEL)
    config.positions = {
        # Heads that look at the 0 to 3 tokens before them: what retrieval is built from, and slow to find from nothing.
        "local": {"name": "t5", "focus": 8.0},
        # Only the global layer has to carry the distance, so only its theta grows.
        "global": {"name": "rope", "theta": BASE_THETA},
    }
    config.optim.b2 = 0.98
    config.optim.weight_decay = 0.01
    config.data.parts = {
        "code": part(kind="text", weight=0.2),
        "needles": part(kind="multikey", weight=0.8, task={"needles": 3, "queries": 3, "answer_weight": 10.0}),
    }
    return config


def stages() -> dict:
    """Short rows first: retrieval is learned many times faster there. An extension takes the critical base of its length."""
    constant = {"lr": 2e-3, "schedule": "constant"}
    theta = {"global": BASE_THETA}
    return {
        "base_64": task(3, seq_len=64, batch_size=64, steps=300, optim={**constant, "lr": 3e-3, "warmup_steps": 40}),
        "base_128": task(6, seq_len=128, batch_size=32, steps=200, positions=theta, optim=constant, keep_optimizer_state=True),
        BASE: task(
            8, seq_len=BASE_LENGTH, batch_size=16, steps=240, positions=theta, optim={"lr": 2e-3}, keep_optimizer_state=True
        ),
        "extend_1024": extension(16, 1024, batch_size=8, steps=180),
        "extend_4096": extension(32, 4096, batch_size=2, steps=180),
    }


def extension(needles: int, seq_len: int, **stage) -> dict:
    """A stage at a new length, at its critical base."""
    theta = critical_base(BASE_THETA, BASE_LENGTH, seq_len)
    return task(needles, seq_len=seq_len, positions={"global": theta}, optim={"lr": 1e-3}, **stage)


def task(count: int, **stage) -> dict:
    """A stage whose retrieval rows hold `count` needles and as many queries."""
    return {**stage, "parts": {"needles": {"task": {"needles": count, "queries": count}}}}


def from_base(lengths, **stage):
    """For sweeps: one short stage `extend` from the base model of a finished quickstart, whose global layer changes its scheme."""
    config = recipe({"extend": {"steps": 25, "optim": {"lr": 1e-3, "warmup_steps": 3}, **stage}})
    config.positions = {"local": config.positions["local"], "default": config.positions["global"]}
    names = list(stages())
    base = sum(stages()[name]["steps"] for name in names[: names.index(BASE) + 1])
    config.init_from = f"{WORKDIR}/checkpoints/{base}"
    config.evals.lengths = lengths
    config.evals.needle_items = 10
    config.evals.perplexity_tokens = 1 << 14
    config.checkpoint.every = None
    config.metrics.writers = "jsonl"
    config.monitor.enabled = False
    return config


def smoke(config) -> None:
    """Shrink every part."""
    for name in config.stage_order:
        config.stages[name].steps = 3
    config.evals.needle_items = 1
    config.evals.zero_shot_items = 1
    config.evals.perplexity_tokens = 4096
