"""The model card of what was exported, from the run that it comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lcx.core.errors import UserError
from lcx.core.gguf import is_gguf
from lcx.core.gguf import read as read_gguf
from lcx.core.trees import num_elements
from lcx.data.chat.chat import template_in
from lcx.training.loading import Loaded


class Adapter(NamedTuple):
    """An exported adapter: its rank, and the folder of the model below it."""

    rank: int
    base: str


def check_hub_name(name: str | None) -> None:
    """Raises `UserError` for what cannot be a model's name on the Hub."""
    if name is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"base_model={name} is not a model's name on the Hub, such as meta-llama/Llama-3.2-1B")


def write_card(
    out: Path, form: str, dtype: str, values: Mapping[str, Any], loaded: Loaded, checkpoint: str | Path, workdir: Path | None,
    source: Path | None, base_model: str | None, adapter: Adapter | None = None,
) -> None:  # fmt: skip
    """Write the card of `out`, weights of a `checkpoint` in `form` and `dtype` with the config.json `values`.

    `workdir` is that of the run (None: of none), `source` the folder with the files of the model that it began with, `base_model`
    that model's name on the Hub (None: what its path says).
    """
    if jax.process_index() != 0:
        return
    # Loaded only now: a card has pictures, whose library models are read without.
    from lcx.report import card

    init_from = loaded.run.init_from
    exported = card.Exported(
        name=out.name, form=form, dtype=dtype, values=values, parameters=num_elements(loaded.params), run=loaded.run,
        meta=loaded.meta, workdir=workdir, checkpoint=str(checkpoint),
        has_template=form != "gguf" and template_in(out) is not None, source=source,
        base_model=base_model or card.hub_name(adapter.base if adapter else init_from), license=_license(init_from),
        rank=adapter and adapter.rank, adapter_of=adapter and adapter.base,
    )  # fmt: skip
    card.write(exported, out)


def _license(init_from: str | None) -> str | None:
    """What a GGUF file says of its licence."""
    if init_from is None or not is_gguf(init_from) or not Path(init_from).is_file():
        return None
    found = read_gguf(init_from).metadata.get("general.license")
    return found if isinstance(found, str) else None
