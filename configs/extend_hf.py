"""A Hugging Face model extended to a longer context, in stages, with needles before and after.

Command:  lcx run --config=configs/extend_hf.py --config.source=models/Llama-3.2-1B --config.target=65536 --workdir=runs/extended
          lcx export --checkpoint=runs/extended --out=models/Llama-3.2-1B-64K
Hardware: a tiny model on 2 CPU cores; for 1B parameters one GPU with 80 GB, for more a slice with `--config.mesh.context=...`.
Time:     experiments/004_hf_round_trip has a run of minutes; otherwise `steps` times what a step of your model takes.
Result:   runs/extended/report.html, what was found before and after, and a folder that transformers and vLLM load.

Every stage takes the critical base of its length as theta on the layers that see the whole context, or
`--config.theta_multiple` times that; `--config.theta` names that of the last stage instead, `--config.monitor.enabled=True` has it
watched and changed. The mixture is code of the running Python's
standard library, with questions about facts, lists, chains, counts and states in it (docs/data.md; needles where the tokenizer is
bytes): name your own text with --config.data.parts.text.source.kind=jsonl --config.data.parts.text.source.path='data/*.jsonl', and
the same for data.parts.task.
"""

from lcx.recipes import extension

complete = extension.complete


def get_config():
    """What flags may change; `complete` adds what follows from the source and the target."""
    return extension.defaults()
