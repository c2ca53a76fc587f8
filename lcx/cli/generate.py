"""Continue prompts with a checkpoint, under its own or any other scheme. The text of a single prompt is written as it comes.

lcx generate --checkpoint=runs/quickstart --prompt='def main(' --max_new_tokens=64 --temperature=0.8 --top_p=0.95
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags

from lcx.cli import parse
from lcx.core.console import say
from lcx.core.errors import UserError
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.data.tokenizers import tokenizers
from lcx.model.config import build_schemes
from lcx.model.decode import Timings
from lcx.model.sampling import Sampling
from lcx.recipes import models
from lcx.recipes.generation import Completion, generate_text, read_prompts


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string("checkpoint", None, "a run's workdir or checkpoint folder, or a Hugging Face folder", flag_values=values)
    flags.DEFINE_string("stage", None, "take the weights at the end of this stage (default: the newest)", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "text to continue; may be repeated", flag_values=values)
    flags.DEFINE_multi_string(
        "prompt_file", [], "a text file, one prompt as it stands; or .jsonl with a 'prompt' in each line", flag_values=values
    )
    flags.DEFINE_integer("max_new_tokens", 128, "most tokens after each prompt", flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token", flag_values=values)
    flags.DEFINE_integer("top_k", None, "draw among the k most likely tokens (default: all)", flag_values=values)
    flags.DEFINE_float("top_p", 1.0, "draw among the most likely tokens of this share together", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the draws", flag_values=values)
    flags.DEFINE_multi_string("stop", [], "text to stop before, as in --stop=$'\\n'; may be repeated", flag_values=values)
    flags.DEFINE_integer("chunk", None, "prompt tokens that are read at a time (default: 512)", flag_values=values)
    flags.DEFINE_string("positions", "none", "a scheme to try zero-shot, such as yarn:factor=16", flag_values=values)
    flags.DEFINE_string("dtype", "float32", f"of the weights: {', '.join(models.DTYPES)}", flag_values=values)
    flags.DEFINE_integer("context", 1, "devices that share the tokens of a row", flag_values=values)
    flags.DEFINE_integer("tensor", 1, "devices that share the heads", flag_values=values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Generate."""
    if rest:
        raise UserError(f"there is an argument too many, {rest[0]!r}; prompts are given as --prompt=TEXT")
    checkpoint = parse.needed(values, "checkpoint", "name a run's workdir, or a Hugging Face folder")
    prompts = [*values.prompt, *(prompt for path in values.prompt_file for prompt in read_prompts(path))]
    if not prompts:
        raise UserError("there is no prompt; give --prompt=TEXT or --prompt_file=FILE")
    sampling = Sampling(values.temperature, values.top_k, values.top_p, values.seed)
    if values.temperature == 0 and (values.top_k is not None or values.top_p < 1):
        raise UserError("--top_k and --top_p choose among tokens that are drawn; add --temperature=1, or leave them out")
    # One device, unless a mesh is asked for: then all of them.
    alone = values.context == values.tensor == 1
    if alone and values.host_devices > 1:
        raise UserError(f"--host_devices={values.host_devices} has nothing to share; add --context=N or --tensor=N")
    mesh = None if alone else make_mesh(MeshConfig(context=values.context, tensor=values.tensor))
    loaded = models.load(checkpoint, stage=values.stage, mesh=mesh, dtype=values.dtype)
    single = len(prompts) == 1
    figures: list[Timings] = []
    generate_text(
        loaded.params,
        loaded.run.model,
        build_schemes(loaded.run.model, loaded.schemes),
        tokenizers.load(loaded.run.data.tokenizer),
        prompts,
        values.max_new_tokens,
        trained=loaded.meta.length,
        positions=values.positions,
        sampling=sampling,
        stop=values.stop,
        stop_ids=models.stop_ids(checkpoint),
        chunk=values.chunk,
        on_text=_write if single else None,
        on_end=None if single else _show,
        report=figures.append,
    )
    if single:
        _write(0, "\n")
    say(_line(figures[0]))


def _write(row: int, piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _show(row: int, completion: Completion) -> None:
    say(f"prompt {row + 1}, {len(completion.tokens):,} new tokens, ended by {completion.ended}:\n{completion.text}\n")


def _line(figures: Timings) -> str:
    decode = "" if figures.decode_rate is None else f", decode {figures.decode_rate:,.1f} tokens/s"
    return (
        f"{figures.prompt_tokens:,} prompt tokens, {figures.new_tokens:,} new; prefill {figures.prefill_rate:,.0f} tokens/s"
        f"{decode} (without {figures.setup_seconds:.1f} s of compiling and laying out)"
    )
