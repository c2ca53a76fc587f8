"""The flags that say how text is drawn from a model, of `lcx generate` and `lcx chat`."""

from __future__ import annotations

from absl import flags

from lcx.core.errors import UserError
from lcx.model.sampling import Sampling

NAMES = {
    f"{name}=": f"--{name}="
    for name in ("temperature", "top_k", "top_p", "seed", "max_new_tokens", "chunk", "length", "dtype", "positions")
}
"""What these settings are called in errors -> what they are called as flags."""


def define(values: flags.FlagValues, max_new_tokens: int, each: str) -> None:
    """The flags; `each` is what `max_new_tokens` are for."""
    flags.DEFINE_integer("max_new_tokens", max_new_tokens, f"maximum number of new tokens per {each}", flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "sampling temperature (default: 0, the most likely token)", flag_values=values)
    flags.DEFINE_integer("top_k", None, "sample from the k most likely tokens (default: all)", flag_values=values)
    flags.DEFINE_float("top_p", 1.0, "sample from the most likely tokens that reach this total probability", flag_values=values)
    flags.DEFINE_integer("seed", 0, "random seed of the sampling (default: 0)", flag_values=values)
    flags.DEFINE_multi_string("stop", [], "stop before this text, as in --stop=$'\\n'", flag_values=values)


def chosen(values: flags.FlagValues) -> Sampling:
    """What the flags say; raises `UserError` for values out of range and for those without effect."""
    sampling = Sampling(values.temperature, values.top_k, values.top_p, values.seed)
    for name in ("top_k", "top_p", "seed"):
        if values.temperature == 0 and values[name].present:
            raise UserError(f"--{name}={values[name].value} only applies to sampling; add --temperature=1 or omit it")
    return sampling
