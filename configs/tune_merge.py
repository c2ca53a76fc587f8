"""Models merged and then trained a little more, at the length of the merge.

Command:  lcx run --config=configs/tune_merge.py --config.source=merge.yml --workdir=runs/merged
          lcx export --checkpoint=runs/merged --out=models/merged-tuned
Hardware: a tiny model on 2 CPU cores; for 1B parameters one GPU with 80 GB, for more a slice with `--config.mesh.context=...`.
Time:     the merge takes about as long as reading and writing the models' files; then `steps` times what a step takes.
Result:   the merge in a folder beside merge.yml, and runs/merged/report.html with the evaluations of before and after.

The YAML file is that of `lcx merge` (docs/merging.md); a Hugging Face folder or a GGUF file may stand in its place. A little noise
on the merged weights, `--config.init_noise=0.01`, shakes them out of the place that averaging left them in; whether that helps your
models is for the two evaluations to say. Name your own text with --config.data.parts.text.source.kind=jsonl
--config.data.parts.text.source.path='data/*.jsonl', and the same for data.parts.task.
"""

from lcx.recipes import tuning

complete = tuning.complete


def get_config():
    """What flags may change; `complete` adds what follows from the source."""
    return tuning.defaults()
