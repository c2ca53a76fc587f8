"""A tiny Llama in Hugging Face's form, extended by 16 times with lcx, and asked for its needles by transformers.

    python experiments/004_hf_round_trip/run.py --workdir=runs/004_hf_round_trip

Needs torch and transformers (`pip install -e '.[dev]'`). Two CPU cores, about 15 minutes, most of it the training of the tiny
Llama. Resumes: what is finished is not run again. Writes results.json and the tables of README.md beside this file: each cell of
the needle grid as lcx's greedy generation and as transformers' find it, of the model before and after its extension.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from lcx.core.mesh import MeshConfig, make_mesh
from lcx.evals import needles
from lcx.evals.suite import EvalConfig, gather
from lcx.model.config import lay_out, schemes_of
from lcx.model.decode import generate
from lcx.research import extension, models, readme
from lcx.research.recipe import defaults, part, recipe, run_recipe

HERE = Path(__file__).parent
TRAINED, TARGET = 64, 1024
ITEMS = 10

TASK = {
    "needles": 3, "queries": 3, "needles_per_1024": 32.0, "queries_per_1024": 32.0, "answer_weight": 10.0,
}  # fmt: skip


def parts() -> dict:
    """Needles and code, as in the quickstart; longer rows hold more needles."""
    return {"code": part(kind="text", weight=0.15), "needles": part(kind="multikey", weight=0.85, task=TASK)}


def base():
    """The quickstart's recipe at its first length, for a Llama: rotary positions and no window in any layer, which takes longer."""
    stage = {"seq_len": TRAINED, "batch_size": 128, "steps": 2600, "optim": {"lr": 5e-3, "warmup_steps": 50}}
    sizes = dict(model_dim=128, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32, mlp_dim=256)
    config = defaults({"base_64": stage}, **sizes, qkv_bias=True, out_bias=True)
    config.positions = {"default": {"name": "rope", "theta": 100.0}}
    config.optim.b2 = 0.98
    config.optim.weight_decay = 0.01
    config.data.parts = parts()
    config.evals.lengths = (TRAINED,)
    return config


def extended(source: Path):
    """What `lcx run --config=configs/extend_hf.py --config.source=... --config.target=1024` runs, with this model's sizes."""
    config = extension.defaults()
    config.source, config.target = str(source), TARGET
    config.update({"steps": 200, "tokens_per_step": 8192})
    config.optim.lr = 1e-3
    config.optim.b2 = 0.98
    config.data.parts = parts()
    return extension.complete(config)


def grids(folder: Path) -> dict[str, list[list[int]]]:
    """Needles found by each side's greedy generation, `[depth][length]`, and how many of the answers differ."""
    loaded = models.load(folder)
    model, run = loaded.run.model, loaded.run
    evals = EvalConfig(lengths=(TRAINED, 4 * TRAINED, TARGET), needle_items=ITEMS, perplexity_tokens=0)
    data = recipe(base()).run.data
    items = gather(data, evals).items
    network = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    def ours(arch, arrays, prompts: list[np.ndarray], new: int) -> np.ndarray:
        return np.stack(generate(loaded.params, arrays, arch, prompts, new))

    def theirs(prompts: list[np.ndarray], new: int) -> np.ndarray:
        rows = []
        for prompt in prompts:
            ids = torch.tensor(prompt[None]).long()
            with torch.no_grad():
                out = network.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0
                )
            rows.append(out[0, len(prompt) :].numpy())
        return np.stack(rows)

    found: dict[str, dict[int, np.ndarray]] = {"lcx": {}, "transformers": {}}
    for length, asked in items.items():
        arch, arrays = lay_out(model, schemes_of(run.model, loaded.schemes), length)
        found["lcx"][length] = needles.generated(functools.partial(ours, arch, arrays), asked, evals.tokens_per_forward)
        found["transformers"][length] = needles.generated(theirs, asked, evals.tokens_per_forward)
    cells = {side: needles.grid(rows, items, evals.depths, "generation", side, None).correct for side, rows in found.items()}
    differ = sum(int(np.sum(found["lcx"][n] != found["transformers"][n])) for n in items)
    return {**{side: [list(row) for row in counts] for side, counts in cells.items()}, "answers that differ": differ}


def main() -> None:
    """Train, export, extend, export, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/004_hf_round_trip"))
    root = parser.parse_args().workdir
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    run_recipe(recipe(base()), root / "base", ["python", "run.py"])
    if not (root / "hf_base").exists():
        models.export_model(root / "base", root / "hf_base", mesh=one)
    run_recipe(recipe(extended(root / "hf_base")), root / "extended", ["python", "run.py"])
    if not (root / "hf_extended").exists():
        models.export_model(root / "extended", root / "hf_extended", mesh=one)
    found = {name: grids(root / f"hf_{name}") for name in ("base", "extended")}
    results = {"lengths": [TRAINED, 4 * TRAINED, TARGET], "depths": list(EvalConfig().depths), "items": ITEMS, "found": found}
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    fill(results)


def fill(results: dict) -> None:
    """The tables of README.md."""
    header = ("model", "depth", *(f"{length:,}" for length in results["lengths"]))
    rows = []
    for name, sides in results["found"].items():
        for depth, ours, theirs in zip(results["depths"], sides["lcx"], sides["transformers"], strict=True):
            rows.append((name, depth, *(f"{a} / {b}" for a, b in zip(ours, theirs, strict=True))))
    readme.fill(HERE / "README.md", "grid", readme.table(header, rows))
    cells = [
        (a, b)
        for sides in results["found"].values()
        for ours, theirs in zip(sides["lcx"], sides["transformers"], strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    differ = sum(sides["answers that differ"] for sides in results["found"].values())
    same = sum(a == b for a, b in cells)
    line = f"{same} of {len(cells)} cells are the same; {differ} of {len(cells) * results['items']} answers differ.\n"
    readme.fill(HERE / "README.md", "finding", line)


if __name__ == "__main__":
    main()
