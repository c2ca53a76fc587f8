"""What the recipes of this folder share: a published model in full fine-tuning, rows shared by devices, text in your own files.

Not a config by itself; the files beside it say what differs. Every one names a slice as TOPOLOGY, for which
`lcx plan --config=configs/pods/NAME.py` compiles its steps; docs/pods.md has what they need and take.
"""

from lcx.core import configs
from lcx.model.presets import family
from lcx.recipes.recipe import defaults, part


def pod(name: str, source: str, stages: dict, **changes):
    """The recipe of a family of `lcx.model.presets`, from the folder `source` of Hugging Face's form, with these stages."""
    chosen = family(name)
    return recipe(chosen.model, chosen.positions, source, stages, **changes)


def recipe(model, positions: dict, source: str, stages: dict, *, lr: float = 2e-5, **optim):
    """A recipe for a model's sizes and positions: AdamW as Llama's authors use it, the text of `data/long`, tasks in that text."""
    config = defaults(stages, **configs.plain(model))
    config.positions = positions
    config.init_from = source
    config.data.tokenizer = source
    config.execution.compute_dtype = "bfloat16"
    config.execution.remat = "block"
    config.optim.lr = lr
    config.optim.weight_decay = 0.1
    for name, value in optim.items():
        config.optim[name] = value
    text = {"kind": "jsonl", "path": "data/long/*.jsonl"}
    config.data.parts = {
        "text": part(weight=0.9, source=text),
        "task": part(kind="questions", weight=0.1, source=text),
    }
    config.checkpoint.every = 25
    config.checkpoint.keep_latest = 1
    # The thetas below are the sources' own: --config.monitor.enabled=True has them watched, and changed where loss oscillates.
    config.monitor.enabled = False
    longest = max(stage.get("max_position") or stage["seq_len"] for stage in stages.values())
    config.evals.tasks = ("needle_in_prose", "perplexity")
    config.evals.lengths = tuple(length for length in (8192, 65536, 262144, 1048576, 4194304) if length <= longest)
    return config


def stage(seq_len: int, theta: float, *, rows: int, steps: int, context: int, ulysses: int = 8, accumulate=1, **more) -> dict:
    """A stage of whole rows, each shared by `context` devices, of which `ulysses` trade heads; other devices take other rows."""
    return {
        "seq_len": seq_len,
        "steps": steps,
        "batch_size": rows,
        "accumulate": accumulate,
        "positions": {"default": theta},
        "mesh": {"fsdp": -1, "context": context, "ulysses": ulysses},
        **more,
    }
