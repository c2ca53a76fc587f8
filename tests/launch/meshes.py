"""Five steps, an evaluation and a generation on a mesh, printed as JSON: a program for one process or for many.

    python meshes.py PORT COUNT PROCESS OUT MESH...

With COUNT 1 there is no job. A mesh is written as its axes, such as `context=4,ulysses=2`, with
`strategy=ring` for a ring where a gather would be chosen; OUT is a shared folder.
"""

import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

import jax

from lcx.core.mesh import MeshConfig, make_mesh
from lcx.data import packing
from lcx.data.loader import Loader
from lcx.evals.config import EvalConfig
from lcx.launch.cluster import find_job
from lcx.launch.distributed import Patience, joined
from lcx.model.architecture import build_schemes
from lcx.recipes import models
from lcx.recipes.generation import generate_text
from lcx.recipes.recipe import evaluate_loaded
from lcx.training.loop import train
from lcx.training.stages import run_config

SOURCE = {"kind": "stdlib", "limit_bytes": 300_000}
STEPS = 5


def config(mesh, strategy, experts, heads):
    """A tiny run on a mesh, of rows of packed text and needles."""
    model = {"vocab_size": 256, "model_dim": 32, "num_layers": 2, "head_dim": 8, "mlp_dim": 64}
    model |= {"num_heads": heads, "num_kv_heads": heads}
    if experts:
        model |= {"num_experts": 8, "experts_per_token": 2}
    task = {"needles": 1, "queries": 1}
    parts = {
        "text": {"weight": 0.75, "source": SOURCE},
        "needles": {"kind": "multikey", "weight": 0.25, "source": SOURCE, "task": task},
    }
    return run_config(
        {
            "model": model,
            "positions": {"default": {"name": "rope", "theta": 100.0}},
            "data": {"parts": parts},
            "stages": [{"name": "base", "seq_len": 128, "steps": STEPS, "batch_size": 8}],
            "optim": {"lr": 3e-3, "warmup_steps": 2},
            "checkpoint": {"every": None},
            "metrics": {"writers": "jsonl", "peak_flops": 1e11},
            "monitor": {"enabled": False},
            "mesh": mesh,
            "execution": {"context_strategy": strategy},
        }
    )


@contextlib.contextmanager
def counted():
    """Counts the bytes of the batches that loaders make here, and the tokens that they read for packed text."""
    found = {"bytes": 0, "tokens": 0}
    batch, window = Loader.batch, packing._targets

    def make(self, *args, **kwargs):
        made = batch(self, *args, **kwargs)
        found["bytes"] += sum(x.nbytes for x in jax.tree.leaves(made) if x.ndim == 2)
        return made

    def targets(tokens, *args):
        found["tokens"] += len(tokens)
        return window(tokens, *args)

    with mock.patch.object(Loader, "batch", make), mock.patch.object(packing, "_targets", targets):
        yield found


def figures(mesh, strategy, workdir, process):
    """Losses and gradient norms of the steps, measurements of an evaluation, and generated tokens, on one mesh."""
    experts, devices = "expert" in mesh, jax.device_count()
    run = config(mesh, strategy, experts, max(4, devices))
    with counted() as share:
        train(run, workdir)
    workdir.with_name(f"{workdir.name}.{process}.share").write_text(json.dumps(share))
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    loaded = models.load(workdir, mesh=make_mesh(MeshConfig(**mesh)))
    evals = EvalConfig(tasks=("needles", "perplexity"), lengths=(128,), needle_items=8, perplexity_tokens=1024, generation_items=2)
    found = evaluate_loaded(loaded, evals, "all", workdir)
    text = generate_text(
        loaded.params, run.model, run.execution, build_schemes(run.model, loaded.schemes),
        models.tokenizers.load("bytes"), ["def main(", "import "] * 4, 12,
    )  # fmt: skip
    return {
        "loss": [row["loss"] for row in rows],
        "grad_norm": [row["grad_norm"] for row in rows],
        "evaluation": [row.value for row in found.rows],
        "generated": [one.tokens.tolist() for one in text],
    }


def main(port, count, process, out, *meshes):
    """Print the figures of every mesh from process 0."""
    jax.config.update("jax_default_matmul_precision", "highest")
    count, process = int(count), int(process)
    job = None if count == 1 else find_job(f"127.0.0.1:{port}", count, process, {})
    with joined(job, Patience(60.0, 20.0, 300.0), lambda: {"meshes": list(meshes)}):
        for name in meshes:
            pairs = dict(pair.split("=") for pair in name.split(","))
            strategy = pairs.pop("strategy", "auto")
            mesh = {"fsdp": 1, **{axis: int(size) for axis, size in pairs.items()}}
            found = figures(mesh, strategy, Path(out) / name, process)
            if process == 0:
                (Path(out) / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
