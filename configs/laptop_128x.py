"""128 times the trained context on a laptop: 256 to 32,768 bytes in stages, what 8K to 1M is for a large model.

Command:  lcx run --config=configs/laptop_128x.py --workdir=runs/laptop_128x
Hardware: 2 CPU cores.
Time:     50 minutes on a machine that other work kept busy: 34 of training, 16 of evaluation.
Result:   needles at 256 / 1,024 / 4,096 / 16,384 / 32,768: 99 / 98 / 100 / 96 / 98%, before the extension 91 / 28 / 6 / 2 / 0%;
          held-out perplexity 5.51 at 256 and 5.40 at 32,768, before the extension 5.98 and 6.07.
"""

from lcx.positions.theta import critical_base
from lcx.research.recipe import defaults

BASE, BASE_LENGTH, BASE_THETA = "base_256", 256, 500.0


def get_config():
    """The recipe."""
    config = defaults(stages(), **MODEL)
    config.positions = {"local": {"name": "t5", "focus": 8.0}, "global": {"name": "rope", "theta": BASE_THETA}}
    config.optim.b2 = 0.98
    config.optim.weight_decay = 0.01
    config.data.parts = {
        "code": {"kind": "text", "weight": 0.2},
        "needles": {"kind": "multikey", "weight": 0.8, "task": {"needles": 3, "queries": 3, "answer_weight": 10.0}},
    }
    config.base_stage = BASE
    config.evals.lengths = (256, 1024, 4096, 16384, 32768)
    config.evals.perplexity_tokens = 1 << 17
    config.evals.tokens_per_forward = 1 << 15
    config.monitor.enabled = False
    return config


MODEL = dict(
    model_dim=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32, mlp_dim=256, pattern=("local", "global"), window=16
)


def stages() -> dict:
    """Each stage of the extension takes the critical base of its length."""
    constant = {"lr": 2e-3, "schedule": "constant"}
    return {
        "base_64": task(3, seq_len=64, batch_size=64, steps=300, optim={**constant, "lr": 3e-3, "warmup_steps": 40}),
        "base_128": task(6, seq_len=128, batch_size=32, steps=200, optim=constant, keep_optimizer_state=True),
        BASE: task(8, seq_len=BASE_LENGTH, batch_size=16, steps=400, optim={"lr": 2e-3}, keep_optimizer_state=True),
        "extend_1024": extension(16, 1024, batch_size=8, steps=120),
        "extend_4096": extension(32, 4096, batch_size=2, steps=120),
        "extend_16384": extension(64, 16384, batch_size=1, steps=60),
        "extend_32768": extension(128, 32768, batch_size=1, steps=50),
    }


def extension(needles: int, seq_len: int, **stage) -> dict:
    """A stage at a new length, at its critical base."""
    theta = critical_base(BASE_THETA, BASE_LENGTH, seq_len)
    return task(needles, seq_len=seq_len, positions={"global": theta}, optim={"lr": 1e-3}, **stage)


def task(count: int, **stage) -> dict:
    """A stage whose retrieval rows hold `count` needles and as many queries."""
    return {**stage, "parts": {"needles": {"task": {"needles": count, "queries": count}}}}
