"""A tiny Llama in Hugging Face's form, extended by 16 times with lcx, and asked for its needles by transformers.

    python experiments/004_hf_round_trip/run.py --workdir=runs/004_hf_round_trip

Needs torch and transformers (`pip install -e '.[dev]'`). Two CPU cores, about 10 minutes. Resumes: what is
finished is not run again. Writes results.json and the tables of README.md beside this file: each cell of the needle grid as lcx's
greedy generation and as transformers' find it, of the model before and after its extension.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from lcx.core.configs import plain
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.evals.backends.local import LocalBackend
from lcx.evals.base import Item
from lcx.evals.config import EvalConfig
from lcx.evals.runner import gather
from lcx.evals.tasks.needles import GeneratedNeedles
from lcx.interop.hf_config import read_file
from lcx.model.architecture import build_schemes
from lcx.recipes import extension, models
from lcx.recipes.recipe import defaults, part, recipe, run_recipe
from lcx.report import markdown
from lcx.training.meta import scheme_configs

HERE = Path(__file__).parent
LENGTHS = (64, 128, 256)
TARGET = 4096
GRID = (LENGTHS[-1], 1024, TARGET)
ITEMS = 10
HEADS, HEAD_DIM, LAYERS, THETA = 4, 32, 2, 350.0
FOCUS, FOCUS_PAIRS = 16.0, 5


def start(folder: Path) -> None:
    """A Llama of random weights, written by transformers, whose first layer's heads begin looking 0, 1, 2 and 3 tokens back.

    That is what retrieval is built from, and slow to find from nothing; the quickstart's local layer begins the same way. Here
    the biases of queries and keys do it: rotated by their positions, they add to the logit of a token d back a sum of
    cos(frequency * (d - h)) in head h, with `FOCUS` in all at its peak over the `FOCUS_PAIRS` fastest pairs.
    """
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=257,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=HEAD_DIM,
            max_position_embeddings=LENGTHS[-1],
            rope_parameters={"rope_type": "default", "rope_theta": THETA},
            attention_bias=True,
            tie_word_embeddings=True,
            initializer_range=64**-0.5,
            bos_token_id=256,
            eos_token_id=None,
        )
    )
    size = (FOCUS * HEAD_DIM**0.5 / FOCUS_PAIRS) ** 0.5
    angles = THETA ** (-2 * torch.arange(FOCUS_PAIRS) / HEAD_DIM) * torch.arange(HEADS)[:, None]
    half = HEAD_DIM // 2
    first = model.model.layers[0].self_attn
    with torch.no_grad():
        queries, keys = first.q_proj.bias.view(HEADS, HEAD_DIM), first.k_proj.bias.view(HEADS, HEAD_DIM)
        queries[:, :FOCUS_PAIRS] = size
        keys[:, :FOCUS_PAIRS] = size * angles.cos()
        keys[:, half : half + FOCUS_PAIRS] = size * angles.sin()
    model.save_pretrained(folder)


def parts(**task) -> dict:
    """The quickstart's mixture."""
    needles = part(kind="multikey", weight=0.8, task={"needles": 3, "queries": 3, "answer_weight": 10.0, **task})
    return {"code": part(kind="text", weight=0.2), "needles": needles}


def base(source: Path):
    """The quickstart's recipe up to its base model, half as many steps again, for the Llama in `source`."""
    constant = {"lr": 2e-3, "schedule": "constant"}
    optims = ({**constant, "lr": 3e-3, "warmup_steps": 40}, constant, {"lr": 2e-3})
    sizes = zip(LENGTHS, (64, 32, 16), (450, 300, 360), (3, 6, 8), optims, strict=True)
    stages = {
        f"base_{length}": {
            "seq_len": length,
            "batch_size": rows,
            "steps": steps,
            "optim": optim,
            "keep_optimizer_state": True,
            "parts": {"needles": {"task": {"needles": count, "queries": count}}},
        }
        for length, rows, steps, count, optim in sizes
    }
    described = read_file(source)
    config = defaults(stages, **plain(described.model))
    config.positions = scheme_configs(described.schemes)
    config.init_from = str(source)
    config.data.tokenizer = "bytes+bos"
    config.optim.b2 = 0.98
    config.optim.weight_decay = 0.01
    config.data.parts = parts()
    config.evals.lengths = LENGTHS
    return config


def extended(source: Path):
    """What `lcx run --config=configs/extend_hf.py --config.source=... --config.target=4096` runs, with this model's sizes."""
    config = extension.defaults()
    config.source, config.target = str(source), TARGET
    config.update({"steps": 200, "tokens_per_step": 8192})
    config.optim.lr = 1e-3
    config.optim.b2 = 0.98
    config.data.parts = parts(needles=4, queries=4, needles_per_1024=8.0, queries_per_1024=8.0)
    return extension.complete(config)


def grids(folder: Path) -> dict[str, list[list[int]]]:
    """Needles found by each side's greedy generation, `[depth][length]`, and how many of the answers differ."""
    loaded = models.load(folder)
    model, run = loaded.run.model, loaded.run
    evals = EvalConfig(lengths=GRID, generation_items=ITEMS, perplexity_tokens=0)
    task = GeneratedNeedles.build(gather(loaded.run.data, evals))
    network = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    schemes, counts = build_schemes(run.model, loaded.schemes), {"lcx": {}, "transformers": {}}
    differ = 0
    for length in GRID:
        items = task.items(length, ITEMS)
        ours = LocalBackend(loaded.params, model, run.execution, schemes, length).generate(items, len(items[0].answer))
        answers = {"lcx": ours, "transformers": [continuation(network, item) for item in items]}
        found = {side: np.asarray([task.score(*pair) for pair in zip(items, made, strict=True)]) for side, made in answers.items()}
        differ += int(np.sum(found["lcx"] != found["transformers"]))
        for side, scores in found.items():
            counts[side][length] = scores.reshape(len(evals.depths), ITEMS).sum(1).astype(int).tolist()
    cells = {side: [list(row) for row in zip(*columns.values(), strict=True)] for side, columns in counts.items()}
    return {**cells, "answers that differ": differ}


def continuation(network, item: Item) -> np.ndarray:
    """The reference implementation's greedy continuation of an item's prompt, as long as its answer."""
    ids = torch.tensor(item.prompt[None]).long()
    length = {"do_sample": False, "max_new_tokens": len(item.answer), "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        return network.generate(ids, attention_mask=torch.ones_like(ids), **length)[0, len(item.prompt) :].numpy()


def main() -> None:
    """Train, export, extend, export, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/004_hf_round_trip"))
    root = parser.parse_args().workdir
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    if not (root / "hf_start").exists():
        start(root / "hf_start")
    run_recipe(recipe(base(root / "hf_start")), root / "base", ["python", "run.py"])
    if not (root / "hf_base").exists():
        models.export_model(root / "base", root / "hf_base", mesh=one)
    run_recipe(recipe(extended(root / "hf_base")), root / "extended", ["python", "run.py"])
    if not (root / "hf_extended").exists():
        models.export_model(root / "extended", root / "hf_extended", mesh=one)
    found = {name: grids(root / f"hf_{name}") for name in ("base", "extended")}
    results = {"lengths": GRID, "depths": list(EvalConfig().depths), "items": ITEMS, "found": found}
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    fill(results)


def fill(results: dict) -> None:
    """The tables of README.md."""
    header = ("model", "depth", *(f"{length:,}" for length in results["lengths"]))
    rows = []
    for name, sides in results["found"].items():
        for depth, ours, theirs in zip(results["depths"], sides["lcx"], sides["transformers"], strict=True):
            rows.append((name, depth, *(f"{a} / {b}" for a, b in zip(ours, theirs, strict=True))))
    markdown.fill(HERE / "README.md", "grid", markdown.table(header, rows))
    cells = [
        (a, b)
        for sides in results["found"].values()
        for ours, theirs in zip(sides["lcx"], sides["transformers"], strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    differ = sum(sides["answers that differ"] for sides in results["found"].values())
    same = sum(a == b for a, b in cells)
    line = f"{same} of {len(cells)} cells are the same; {differ} of {len(cells) * results['items']} answers differ.\n"
    markdown.fill(HERE / "README.md", "finding", line)


if __name__ == "__main__":
    main()
