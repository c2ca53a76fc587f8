"""Time of causal attention on a GPU, forward and backward in bfloat16: lcx, cuDNN through JAX, and torch with each of its kernels.

Run it as `python benchmarks/gpu_attention.py` on a machine with a GPU and a torch that sees it; sides that the machine lacks are
left out. Kernels take turns and the best of `--repeats` counts. `results/<card>.json` gets the rows, in place of those of the same
side and shape.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable, Sequence

# Both libraries live on one card, so neither may take all of its memory beforehand.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from attention import compiled
from attention import measure as in_turns

from lcx.attention.attend import attend
from lcx.attention.spec import AttentionSpec
from lcx.core.batch import Index
from lcx.core.mask import Mask
from lcx.positions.scheme import SchemeSpec

RESULTS = pathlib.Path(__file__).parent / "results"
SHAPES = ((32768, 32, 8, 128), (32768, 9, 3, 64), (131072, 32, 8, 128), (131072, 9, 3, 64))
"""Tokens, heads, KV heads, head dim."""

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Passes = dict[str, Callable[[], object]]
"""Closures that run the forward pass, and both passes, and wait for them."""


def operands(shape: Sequence[int]) -> list[np.ndarray]:
    """Queries, keys, values and the output's gradient, float32 `[1, T, N or K, H]`."""
    T, N, K, H = shape
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, T, heads, H), np.float32) for heads in (N, K, K, N)]


def of_jax(attention: Attention, buffers: Sequence[np.ndarray]) -> Passes:
    """Both passes of a function of JAX."""
    q, k, v, do = (jnp.asarray(x, jnp.bfloat16) for x in buffers)
    return {
        "fwd": compiled(attention, q, k, v),
        "both": compiled(lambda q, k, v, do: jax.vjp(attention, q, k, v)[1](do), q, k, v, do),
    }


def lcx(buffers: Sequence[np.ndarray]) -> Passes:
    """What lcx chooses for this device."""
    T, H = buffers[0].shape[1], buffers[0].shape[3]
    index, spec = Index.dense(1, T), AttentionSpec(Mask(), SchemeSpec(), scale=H**-0.5)
    return of_jax(lambda q, k, v: attend(spec, q, k, v, index, index, q_tables={}, k_tables={}), buffers)


def jax_cudnn(buffers: Sequence[np.ndarray]) -> Passes:
    """cuDNN as JAX calls it."""
    return of_jax(functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"), buffers)


def torch_with(kernel: str | None, buffers: Sequence[np.ndarray]) -> Passes:
    """torch's scaled_dot_product_attention with one of its kernels, or with the one that it chooses."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, do = (torch.from_numpy(x).to(device, torch.bfloat16).transpose(1, 2).contiguous() for x in buffers)
    for x in (q, k, v):
        x.requires_grad_(True)

    def run(backward: bool) -> None:
        choice = contextlib.nullcontext() if kernel is None else sdpa_kernel(SDPBackend[kernel])
        with choice, torch.set_grad_enabled(backward):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            if backward:
                out.backward(do)
        if device == "cuda":
            torch.cuda.synchronize()

    return {"fwd": functools.partial(run, False), "both": functools.partial(run, True)}


def sides() -> dict[str, Callable[[Sequence[np.ndarray]], Passes]]:
    """Those that this machine has."""
    found, on_gpu = {"lcx": lcx}, jax.default_backend() == "gpu"
    if on_gpu:
        found["jax cudnn"] = jax_cudnn
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available() == on_gpu:
            found["torch default"] = functools.partial(torch_with, None)
        if torch.cuda.is_available() and on_gpu:
            found["torch flash"] = functools.partial(torch_with, "FLASH_ATTENTION")
            found["torch cudnn"] = functools.partial(torch_with, "CUDNN_ATTENTION")
    return found


def measure(shape: Sequence[int], repeats: int) -> list[dict]:
    """A row a side: milliseconds, and TFLOP/s of the products under a causal mask: two of them forward, seven in both passes."""
    T, N, K, H = shape
    buffers = operands(shape)
    prepared = {name: side(buffers) for name, side in sides().items()}
    best = in_turns({(name, part): run for name, passes in prepared.items() for part, run in passes.items()}, repeats)
    product = T * T * H * N  # multiplications and additions of one product of matrices, half of which the mask leaves out
    work = {"fwd": 2 * product, "both": 7 * product}
    return [
        {"side": name, "T": T, "H": H, "N": N, "KV": K}
        | {f"{part}_ms": round(1e3 * best[name, part]["wall"], 2) for part in work}
        | {f"{part}_tf": round(work[part] / best[name, part]["wall"] / 1e12) for part in work}
        for name in prepared
    ]


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    card = jax.devices()[0].device_kind
    name = card.lower().removeprefix("nvidia ").replace(" ", "_")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / f"{name}.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", type=lambda text: tuple(map(int, text.split("x"))), nargs="+", default=SHAPES, help="TxNxKxH")
    arguments = parser.parse_args()
    record = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    record |= {"device": card, "jax": jax.__version__}
    for shape in arguments.shapes:
        new = measure(shape, arguments.repeats)
        measured = {(row["side"], *shape) for row in new}
        before = record.get("attention", [])
        kept = [row for row in before if tuple(row[key] for key in ("side", "T", "N", "KV", "H")) not in measured]
        record["attention"] = [*kept, *new]
        for row in new:
            print(json.dumps(row), flush=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
