"""The model card of an exported model: what was done, what was measured, how it is served."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lcx.core.console import warn
from lcx.core.files import write_atomically
from lcx.core.quantized import KINDS
from lcx.evals.results import EvalResult, perplexity
from lcx.interop.folder import CARD, terms
from lcx.report import history, markdown, report, serving, style
from lcx.report.question_plots import scored
from lcx.training.meta import Meta
from lcx.training.stages import RunConfig

PICTURES = {
    "summary": "Needles before and after, perplexity, and training loss by stage",
    "needles": "Needles found",
    "tasks": "Questions in words",
    "kinds": "Held-out loss by kind of token",
    "perplexity": "Perplexity",
    "loss": "Training loss",
}
"""Pictures of a run's report that a card shows: file name -> what they show."""

_SHOWN_BY_SUMMARY = ("needles", "perplexity", "loss")
PLOTS = "plots"
SOURCE_CARD = "README.source.md"
"""Name beside the exported weights of the card that came with the model that a run began with."""

_UNMEASURED = "These weights were not evaluated. `lcx eval` measures them, and `lcx export` then writes here what it found."
_KEPT_OF_SOURCE = ("license", "license_name", "license_link", "language")
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_IN_HUB_CACHE = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/")


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was exported: its name, form ("hf", "gguf" or "peft") and `dtype`, with the config.json `values` that say the same.

    `workdir` is that of the run it comes from, None for a model that was only converted; `checkpoint` is what was named. `source`:
    the folder with card and licence of the model that the run began with, if there is one. `base_model`: that model's name on the
    Hub. `license`: what is known where no card says it. `rank`: an adapter's, and `adapter_of` the model below it.
    """

    name: str
    form: str
    dtype: str
    values: Mapping[str, Any]
    parameters: int
    run: RunConfig
    meta: Meta
    workdir: Path | None
    checkpoint: str
    has_template: bool
    source: Path | None = None
    base_model: str | None = None
    license: str | None = None
    rank: int | None = None
    adapter_of: str | None = None


def write(exported: Exported, out: Path) -> None:
    """Write a card: `README.md` into the folder `out`, with the run's pictures and the source's card and licence beside it.

    For a GGUF file `out`, write the file of the same name that ends in `.md`, if there is none yet.
    """
    if exported.form == "gguf":
        path = out.with_suffix(".md")
        if path.exists():
            warn(f"{path} is there already and stays as it is; the card of {out.name} was not written")
            return
        write_atomically(path, text(exported))
        return
    run = _history(exported)
    shown = [] if run is None else _pictures(exported, run)
    for name in shown:
        (out / PLOTS).mkdir(exist_ok=True)
        shutil.copyfile(Path(exported.workdir or "") / PLOTS / f"{name}.png", out / PLOTS / f"{name}.png")
    for path in terms(exported.source) if exported.source else ():
        shutil.copyfile(path, out / (SOURCE_CARD if path.name == CARD else path.name))
    write_atomically(out / CARD, text(exported, shown))


def text(exported: Exported, pictures: Sequence[str] = ()) -> str:
    """The whole card, as Markdown with front matter."""
    run = _history(exported)
    trained = exported.workdir is not None and exported.meta.step > 0
    parts = [
        f"# {exported.name}",
        _lead(exported, trained),
        *(("## What was done", _done(exported, run)) if trained else ()),
        "## Evaluation",
        _evaluation(exported, run),
        *(f"![{PICTURES[name]}]({PLOTS}/{name}.png)" for name in pictures),
        "## How to serve",
        *_serving(exported),
    ]
    return f"---\n{_front(exported)}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def front_matter(card: str) -> dict[str, Any]:
    """The front matter of a card; empty where there is none that can be read."""
    found = _FRONT.match(card.lstrip("\ufeff"))
    try:
        values = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def hub_name(path: str | Path | None) -> str | None:
    """The name on the Hub of a folder in the Hub's own cache, None for any other."""
    found = None if path is None else _IN_HUB_CACHE.search(f"{Path(path).absolute()}/")
    return None if found is None else f"{found['owner']}/{found['name']}"


def _front(exported: Exported) -> str:
    card = exported.source / CARD if exported.source else None
    said = front_matter(card.read_text("utf-8", "replace")) if card and card.is_file() else {}
    values: dict[str, Any] = {key: said[key] for key in _KEPT_OF_SOURCE if key in said}
    if "license" not in values and exported.license is not None:
        values["license"] = exported.license
    if exported.base_model is not None:
        values["base_model"] = exported.base_model
    values["library_name"] = {"hf": "transformers", "peft": "peft", "gguf": "gguf"}[exported.form]
    values["pipeline_tag"] = "text-generation"
    values["tags"] = ["lcx", "long-context", *(["lora"] if exported.form == "peft" else [])]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _lead(exported: Exported, trained: bool) -> str:
    length = exported.meta.length
    began = exported.base_model or (None if exported.run.init_from is None else Path(exported.run.init_from).name)
    what = f"An adapter of rank {exported.rank}" if exported.form == "peft" else f"{style.number(exported.parameters)} parameters"
    how = f"{exported.dtype}, for {length:,} tokens"
    if not trained:
        told = f"{what} in {how}: a conversion of `{began or Path(exported.checkpoint).name}` by lcx, without any training."
    elif began is None:
        told = f"{what} in {how}, trained from scratch with lcx."
    else:
        told = f"{what} in {how}, trained with lcx from `{began}`."
    if exported.form != "gguf" and exported.source and (exported.source / CARD).is_file():
        told += f" The card of the model that it began with: [{SOURCE_CARD}]({SOURCE_CARD})."
    return told


def _done(exported: Exported, run: history.Run | None) -> str:
    meta, config = exported.meta, exported.run
    tries = {} if run is None else {stage.curve.name: stage for stage in run.stages() if stage.curve.kept}
    rows = []
    for index, stage in enumerate(config.stages[: meta.stage_index + 1]):
        steps = meta.stage_step if index == meta.stage_index else stage.steps
        logged = tries.get(stage.name)
        theta = "–" if logged is None or logged.curve.theta is None else style.number(logged.curve.theta)
        whole = logged is not None and len(logged.curve.steps) == steps
        loss = f"{logged.final_loss:.3f}" if whole else "–"
        tokens = steps * stage.batch_size * stage.seq_len
        length = f"{stage.seq_len:,}" + (f", positions up to {stage.length:,}" if stage.length > stage.seq_len else "")
        rows.append((stage.name, length, theta, f"{steps:,}", f"{stage.batch_size:,}", f"{tokens:,}", loss))
    heads = ("stage", "length", "theta", "steps", "rows a step", "tokens", "final loss")
    return "\n\n".join((markdown.table(heads, rows), _trained(exported), _positions(exported), _data(exported)))


def _trained(exported: Exported) -> str:
    run = exported.run
    optim = run.optim_of(run.stages[exported.meta.stage_index])
    frozen = f", but for {_listed(optim.freeze)}, which stayed as they were" if optim.freeze else ""
    how = f"with {optim.name}, learning rate {optim.lr:g}"
    if run.adapters is None:
        return f"All parameters were trained{frozen}, {how}."
    lora = run.adapters
    besides = f", and {_listed(lora.train)} in full" if lora.train else ""
    where = "they are in this folder" if exported.form == "peft" else "they are folded into the weights"
    kind = "DoRA" if lora.dora else "LoRA"
    over = f" over a base in {lora.base_dtype}" if lora.base_dtype in KINDS else ""
    return (
        f"Trained were adapters ({kind}, rank {lora.rank}, alpha {lora.alpha:g}) of {_listed(lora.targets)}{besides}{frozen}"
        f"{over}, {how}; {where}."
    )


def _positions(exported: Exported) -> str:
    return f"Positions, as in `config.json`: `{json.dumps(exported.values['rope_parameters'])}`."


def _data(exported: Exported) -> str:
    data = exported.run.data_of(exported.run.stages[exported.meta.stage_index])
    total = sum(part.weight for part in data.parts.values())
    rows = []
    for name, part in data.parts.items():
        paths = [part.source.path] if isinstance(part.source.path, str) else list(part.source.path)
        named = ", ".join(f"`{Path(path).name}`" for path in paths if path)
        rows.append((name, part.kind, f"{100 * part.weight / total:.0f}%", f"{part.source.kind} {named}".strip()))
    return markdown.table(("part of the mixture", "kind", "rows", "source"), rows)


def _evaluation(exported: Exported, run: history.Run | None) -> str:
    if run is None or run.after is None:
        return _UNMEASURED
    tiles = "\n".join(f"- {caption}: **{value}** ({small})" for caption, value, small in report.tiles(run) if caption != "training")
    lengths = sorted({row.length for row in _scores(run.after).rows})
    rows = []
    for task in _scores(run.after).values("task"):
        for name, result in (("before", run.before), ("after", run.after)):
            found = None if result is None else _scores(result).select(task=task)
            if found is not None:
                by_length = found.by_length()
                cells = (_shown(task, by_length[length]) if length in by_length else "–" for length in lengths)
                rows.append((task, name if run.before else "", *cells))
    note = "Means at each length in tokens: scores, and shares of needles found, in percent; perplexity as it is."
    if run.before:
        note += f" `before` is the model that the extension started from, trained at {run.before.trained:,} tokens."
    shown = markdown.table(("task", "", *(f"{length:,}" for length in lengths)), rows)
    return "\n\n".join((tiles, f"{shown}\n\n{note}" if rows else "")).strip() or _UNMEASURED


def _scores(result: EvalResult) -> EvalResult:
    """The rows of scores and of perplexity under the checkpoint's own scheme."""
    own = [row for row in result.rows if row.scheme == "none"]
    losses = [row for row in own if (row.task, row.metric) == ("perplexity", "nll")]
    return dataclasses.replace(result, rows=(*scored(dataclasses.replace(result, rows=tuple(own))).rows, *losses))


def _shown(task: str, value: float) -> str:
    return style.number(perplexity(value)) if task == "perplexity" else f"{100 * value:.1f}"


def _serving(exported: Exported) -> list[str]:
    name, length, values = exported.name, exported.meta.length, exported.values
    if exported.form == "gguf":
        return [serving.llama_server(name, values, length, None)]
    if exported.form == "peft":
        below = exported.base_model or exported.adapter_of or ""
        parts = {
            "vLLM": serving.vllm_adapter(name, below, values, length, exported.rank or 1),
            "transformers and peft": serving.transformers(name, length, exported.has_template, below),
        }
    else:
        parts = {
            "vLLM": serving.vllm(name, values, length),
            "llama.cpp": serving.llama_server(name, values, length, _relative(exported.checkpoint)),
            "transformers": serving.transformers(name, length, exported.has_template),
        }
    return [piece for heading, shown in parts.items() for piece in (f"### {heading}", shown)]


def _history(exported: Exported) -> history.Run | None:
    """What the run left, with those evaluations alone that are of the exported weights, or of the model before the extension."""
    workdir, step = exported.workdir, exported.meta.step
    if workdir is None or not ((workdir / "metrics.jsonl").exists() or list((workdir / "eval").glob("*.json"))):
        return None
    run = history.load(workdir)
    if exported.run.init_from is None and run.before is not None and run.before.step == step:
        # What the extension starts from is what was exported.
        return dataclasses.replace(run, evals=(dataclasses.replace(run.before, label="measured"),))
    own = tuple(result for result in run.evals if result.label != "before" and result.step == step)
    return dataclasses.replace(run, evals=(*([run.before] if run.before and own else []), *own))


def _pictures(exported: Exported, run: history.Run) -> list[str]:
    """The pictures that the run's report has drawn of these weights."""
    assert exported.workdir is not None
    drawn = [name for name in PICTURES if (exported.workdir / PLOTS / f"{name}.png").is_file()]
    if run.after is None or run.after.label != "after":
        return []
    return [name for name in drawn if "summary" not in drawn or name not in _SHOWN_BY_SUMMARY]


def _relative(path: str) -> str:
    """The path as it was given, but for one from the root of a machine, whose name is all that means anything elsewhere."""
    return Path(path).name if Path(path).is_absolute() else path


def _listed(patterns: Sequence[str]) -> str:
    return ", ".join(f"`{pattern}`" for pattern in patterns)
