"""A small model trained on whole rows of 1,048,576 bytes on a laptop, in less memory than 2 GiB: each row is walked in chunks.

Command:  lcx run --config=configs/million_tokens.py --workdir=runs/million
          shorter: --config.stages.row.seq_len=65536
Hardware: a CPU core, 2 GiB of memory.
Time:     37 minutes on a core of an Intel Xeon, bound to it by `taskset --cpu-list 0`: a model of one head gains nothing from more.
          Rows of 65,536 bytes take 9 s, of 131,072 35 s: time grows with the square.
Result:   a peak of 1.73 GB (1.18 GB with rows of 65,536 bytes), a finite loss of 3.06. What a model learns from one row was not
          measured.
"""

from lcx.positions.theta import critical_base
from lcx.recipes.recipe import defaults, part

BASE_LENGTH, BASE_THETA = 2048, 350.0
MODEL = dict(
    model_dim=32, num_layers=2, num_heads=1, num_kv_heads=1, head_dim=16, mlp_dim=64, pattern=("local", "global"), window=16
)


def get_config():
    """Some steps of short rows, and one of a row of a million tokens."""
    length = 1 << 20
    config = defaults(
        {
            "base": {"seq_len": BASE_LENGTH, "batch_size": 4, "steps": 40, "optim": {"lr": 3e-3, "warmup_steps": 10}},
            "row": {
                "seq_len": length,
                "batch_size": 1,
                "steps": 1,
                "positions": {"global": critical_base(BASE_THETA, BASE_LENGTH, length)},
                "optim": {"lr": 1e-3, "schedule": "constant", "warmup_steps": 0},
            },
        },
        **MODEL,
    )
    config.positions = {"local": {"name": "t5", "focus": 8.0}, "global": {"name": "rope", "theta": BASE_THETA}}
    config.execution.recurrent_chunk = 4096
    config.data.parts = {"code": part(kind="text")}
    config.evals.tasks = ("perplexity",)
    config.evals.lengths = (BASE_LENGTH, 8 * BASE_LENGTH)
    config.evals.perplexity_tokens = 1 << 15
    config.metrics.writers = "jsonl"
    return config
