"""Continue prompts with a checkpoint, under its own or any other positional scheme. The text of a single prompt is streamed.
Standard output gets the generated text and nothing else; figures and notices go to standard error.

lcx generate --checkpoint=runs/quickstart --prompt='def main(' --max_new_tokens=64 --temperature=0.8 --top_p=0.95
lcx generate --checkpoint=models/Llama-3.2-1B-Instruct --chat --prompt='What is a context window?'
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags

from lcx.cli import config_flags, distributed_flags, parse, sampling_flags
from lcx.core import processes
from lcx.core.console import say
from lcx.core.errors import UserError, naming
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.data.tokenizers import tokenizers
from lcx.evals import zero_shot
from lcx.model.architecture import build_schemes
from lcx.model.decode import Timings
from lcx.recipes import models
from lcx.recipes.generation import Completion, OnEnd, chat_of, generate_text, read_prompts


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string(
        "checkpoint", None, "a run's workdir, one of its checkpoints, a Hugging Face folder or a GGUF file", flag_values=values
    )
    flags.DEFINE_string("stage", None, "use the weights from the end of this stage (default: the newest)", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "text to continue", flag_values=values)
    flags.DEFINE_multi_string(
        "prompt_file", [], "a text file with one prompt, or a .jsonl file with a 'prompt' on each line", flag_values=values
    )
    flags.DEFINE_bool("chat", False, "ask each prompt as a user's turn, under the model's chat template", flag_values=values)
    flags.DEFINE_string("system", None, "with --chat, the system message before it", flag_values=values)
    flags.DEFINE_string("chat_template", None, "with --chat, a file with another template (jinja2)", flag_values=values)
    sampling_flags.define(values, 128, "prompt")
    flags.DEFINE_integer("chunk", None, "prompt tokens to process at a time (default: 512)", flag_values=values)
    flags.DEFINE_string("positions", "none", "positional scheme to try zero-shot, such as yarn:factor=16", flag_values=values)
    config_flags.define_dtype(values)
    flags.DEFINE_integer("context", 1, "devices to split the tokens of a row over", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("tensor", 1, "devices to split the heads over", lower_bound=1, flag_values=values)
    distributed_flags.define(values)


@naming({"mesh.context": "--context", "mesh.tensor": "--tensor", **sampling_flags.NAMES})
def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Generate."""
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; give prompts with --prompt=TEXT")
    checkpoint = parse.needed(values, "checkpoint", "name a run's workdir, a Hugging Face folder or a GGUF file")
    prompts = [*values.prompt, *(prompt for path in values.prompt_file for prompt in read_prompts(path))]
    if not prompts:
        raise UserError("no prompt given; use --prompt=TEXT or --prompt_file=FILE")
    for name in ("system", "chat_template"):
        if values[name].value is not None and not values.chat:
            raise UserError(f"--{name} belongs to --chat, which is not given; add it or leave --{name} out")
    zero_shot.check(values.positions, "--positions")
    sampling = sampling_flags.chosen(values)
    # One device, unless a mesh is requested: then all of them.
    one_device = values.context == values.tensor == 1
    if one_device and (values.host_devices or 1) > 1 and processes.count() == 1:
        raise UserError(f"--host_devices={values.host_devices} has no effect without a mesh; add --context=N or --tensor=N")
    # As many processes as there are share the work.
    mesh = models.job_mesh(checkpoint) if one_device else make_mesh(MeshConfig(context=values.context, tensor=values.tensor))
    loaded = models.load(checkpoint, stage=values.stage, mesh=mesh, dtype=values.dtype)
    ask = chat_of(loaded, checkpoint, values.chat_template, "--chat_template") if values.chat else None
    single = len(prompts) == 1
    figures: list[Timings] = []
    generate_text(
        loaded.params,
        loaded.run.model,
        loaded.run.execution,
        build_schemes(loaded.run.model, loaded.schemes),
        tokenizers.load(loaded.run.data.tokenizer) if ask is None else ask.tokenizer,
        prompts,
        values.max_new_tokens,
        trained=loaded.meta.length,
        positions=values.positions,
        sampling=sampling,
        stop=values.stop,
        stop_ids=loaded.stop_ids,
        chunk=values.chunk,
        ask=ask,
        system=values.system,
        on_text=_write if single else None,
        on_end=None if single else _show_in_order(),
        report=figures.append,
    )
    if single:
        _write(0, "\n")
    if processes.is_first():
        say(_line(figures[0]), stderr=True)


def _write(row: int, piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _show_in_order() -> OnEnd:
    """Shows a completion as soon as those of all earlier prompts are shown; the texts themselves carry no labels."""
    waiting: dict[int, Completion] = {}
    following = 0

    def show(row: int, completion: Completion) -> None:
        nonlocal following
        waiting[row] = completion
        while following in waiting:
            ready = waiting.pop(following)
            following += 1
            say(f"prompt {following}, {len(ready.tokens):,} new tokens, ended by {ready.ended}:", stderr=True)
            _write(following, f"{ready.text}\n\n")

    return show


def _line(figures: Timings) -> str:
    decode = "" if figures.decode_rate is None else f", decode {figures.decode_rate:,.1f} tokens/s"
    return (
        f"{figures.prompt_tokens:,} prompt tokens, {figures.new_tokens:,} new; prefill {figures.prefill_rate:,.0f} tokens/s"
        f"{decode} (excluding {figures.setup_seconds:.1f} s of compilation and setup)"
    )
