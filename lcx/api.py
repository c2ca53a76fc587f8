"""What a notebook needs of lcx, in a handful of functions; `import lcx` offers them as `lcx.load` and so on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_collections
from jax.sharding import Mesh

from lcx.cli import parse
from lcx.core import configs
from lcx.core.errors import UserError
from lcx.data.tokenizers import tokenizers
from lcx.evals.config import EvalConfig, QuestionConfig
from lcx.evals.results import EvalResult
from lcx.model.architecture import build_schemes
from lcx.model.sampling import Sampling
from lcx.positions.registry import from_config
from lcx.positions.scheme import Scheme
from lcx.positions.theta import report as theta_report
from lcx.recipes import extension, models
from lcx.recipes.cores import on_cores
from lcx.recipes.generation import Completion, chat_of, generate_text
from lcx.recipes.recipe import evaluate_loaded, recipe
from lcx.training import loop
from lcx.training.loading import Loaded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["evaluate", "export", "extend", "generate", "load", "plot", "scheme", "theta_report", "train"]


def load(
    path: str | Path, *, stage: str | None = None, step: int | None = None, dtype: str = "auto", mesh: Mesh | None = None
) -> Loaded:
    """The weights of a run's workdir, of one of its checkpoint folders, of a Hugging Face folder, or of a GGUF file.

    `stage` or `step` chooses a checkpoint of a run (default: the newest); `dtype` of the weights is float32, bfloat16, float16 or
    auto: float32 for a run, and for others bfloat16 on TPUs and GPUs, float32 on CPUs. `mesh` defaults to the first device. Raises
    `UserError` if nothing can be read there.
    """
    return models.load(path, step=step, stage=stage, mesh=mesh, dtype=dtype)


def generate(
    model: Loaded,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    positions: str = "none",
    chunk: int | None = None,
    chat: bool = False,
    system: str | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """Continue each of `prompts`; temperature 0 takes the most likely token.

    A text ends before a string of `stop`, at an end token of the model, or after `max_new_tokens`. `positions` tries a scheme
    zero-shot. With `chat` a prompt is what a user says under the model's chat template, after the message `system`, and the text is
    the answer. `on_text(prompt, piece)` is called as text becomes certain.
    """
    if isinstance(prompts, str):
        raise UserError("prompts must be a list of texts, not a single text; write [prompt]")
    ask = chat_of(model, f"the tokenizer {model.run.data.tokenizer!r}", None, "data.chat_template") if chat else None
    return generate_text(
        model.params, model.run.model, model.run.execution, build_schemes(model.run.model, model.schemes),
        tokenizers.load(model.run.data.tokenizer), prompts, max_new_tokens, trained=model.meta.length, positions=positions,
        sampling=Sampling(temperature, top_k, top_p, seed), stop=stop, stop_ids=model.stop_ids, chunk=chunk, ask=ask,
        system=system, on_text=on_text,
    )  # fmt: skip


def evaluate(
    model: Loaded,
    *,
    lengths: Sequence[int] = EvalConfig().lengths,
    positions: Sequence[str] = (),
    items: int = 20,
    tasks: Sequence[str] = EvalConfig().tasks,
    generation_items: int = 0,
    perplexity_tokens: int = 1 << 16,
    questions: Mapping[str, Any] | None = None,
    workdir: str | Path | None = None,
    label: str = "eval",
) -> EvalResult:
    """The `tasks` at each of `lengths` (tokens), under the model's own scheme and under each of `positions`.

    `items` needles a cell, and questions of each task in words, whose other settings (`evals.config.QuestionConfig`) are
    `questions`, as in `{"qa_1": "dev-v2.0.json"}`; `generation_items` of them by generation too, `perplexity_tokens` held-out
    tokens at each length. Writes `eval/<label>.json` only where a `workdir` is given.
    """
    config = EvalConfig(
        tasks=tuple(tasks), lengths=tuple(lengths), needle_items=items, zero_shot=tuple(positions), zero_shot_items=items,
        generation_items=generation_items, perplexity_tokens=perplexity_tokens,
        questions=configs.build(QuestionConfig, {"samples": items, **(questions or {})}, "questions"),
    )  # fmt: skip
    return evaluate_loaded(model, config, label, None if workdir is None else Path(workdir))


def train(
    config: str | Path | ml_collections.ConfigDict, workdir: str | Path, overrides: Mapping[str, Any] | None = None
) -> Loaded:
    """Train the stages of a config, without evaluations, and return the model at the end; the same call resumes.

    `config` is a config file as on the command line ("configs/quickstart.py:smoke"), or the `ConfigDict` of its `get_config()`.
    `overrides` maps keys to values, as `--config.KEY=VALUE` does: `{"stages.extend_4096.steps": 200}`.
    """
    complete = None
    if not isinstance(config, ml_collections.ConfigDict):
        complete = getattr(parse.module(str(config).partition(":")[0]), "complete", None)
        config = parse.load(str(config))
    _override(config, overrides or {})
    return _trained(config if complete is None else complete(config), workdir, parse.steps_key(config))


def extend(source: str | Path, target: int, workdir: str | Path, **overrides: Any) -> Loaded:
    """Extend a Hugging Face folder or a GGUF file to `target` tokens, without evaluations, and return the model at the end.

    What `lcx run --config=configs/extend_hf.py` does; the same call resumes. `overrides` are values of that config, such as
    `steps=50, accumulate=4, **{"optim.lr": 1e-5, "lora.rank": 16}`.
    """
    config = extension.defaults()
    _override(config, {"source": str(source), "target": target, **overrides})
    return _trained(extension.complete(config), workdir, parse.steps_key(config))


def plot(results: EvalResult | Sequence[EvalResult] | Mapping[str, EvalResult], task: str | None = None) -> Figure:
    """A picture of one or more evaluations side by side, titled by their labels or by the keys of a mapping.

    One task, which `task` may choose, is a heatmap over length and depth, or lines over length if it has no depths; several tasks
    are a table of scores by length; without scores it is perplexity by length.
    """
    # Loaded only now: drawing takes a library that the other functions do without.
    from lcx.report.overview import overview

    return overview(results, task)


def _trained(complete: ml_collections.ConfigDict, workdir: str | Path, fewer: str) -> Loaded:
    run = on_cores(recipe(complete).run)
    loop.train(run, workdir, given=models.initial_weights(run.init_from), fewer=fewer)
    return models.load(workdir)


def _override(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        parse.value_at(config, key)
        config.update_from_flattened_dict({key: value})


def export(
    path: str | Path,
    out: str | Path,
    *,
    stage: str | None = None,
    step: int | None = None,
    dtype: str | None = None,
    form: str = "hf",
    base_model: str | None = None,
) -> Path:
    """Write the weights of a run as a new Hugging Face folder `out`, or with `form` "gguf" as a GGUF file, and return it.

    `dtype` None is that of the model that the run started from, else float32; a GGUF file may also be `q8_0`. The model card that
    is written with it names that model as `base_model` on the Hub (None: what its path says).
    """
    models.export_model(path, Path(out), step=step, stage=stage, dtype=dtype, form=form, base_model=base_model)
    return Path(out)


def scheme(spec: str | Mapping[str, Any]) -> Scheme:
    """The positional scheme of a text such as "yarn:factor=16", or of a mapping with a `name`."""
    return from_config(spec)
