"""LongCE (2410.23771): loss weights for a prepared dataset's tokens, larger where a long context helps a model to predict them."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from lcx.core.configs import plain
from lcx.data.config import SourceConfig
from lcx.data.curation.dependency import LongCeSettings, longce_weights
from lcx.data.sources import token_weights
from lcx.data.sources.prepared import checked_meta, open_prepared
from lcx.evals.tasks.key_tokens import losses
from lcx.recipes.reader import Reader, by_length


def add_weights(
    folder: str | os.PathLike[str], reader: Reader, settings: LongCeSettings, report: Callable[[int], None] | None = None
) -> None:
    """Weigh all tokens of the dataset in `folder`; a rerun resumes. `report` is called with the number of shards that are done.

    Raises `UserError` if the dataset is not finished or has another tokenizer than the model.
    """
    source = SourceConfig("array_record", str(folder))
    place, _ = checked_meta(source, reader.tokenizer)
    reader.check("longce.window", settings.window)
    data = open_prepared(source, reader.tokenizer, weighted=False)
    identity = {"kind": "longce", "model": reader.fingerprint, "settings": plain(settings)}

    def weigh(document: int) -> np.ndarray:
        length = int(data.lengths[document])
        return document_weights(reader, data.gather(np.array([document]), np.array([0]), np.array([length])), settings)

    token_weights.write(place, identity, data.shards, weigh, report)


def document_weights(reader: Reader, tokens: np.ndarray, settings: LongCeSettings) -> np.ndarray:
    """Loss weights float64 `[n]` of a document's tokens int32 `[n]`, each for the prediction of that token.

    A document longer than the window is read in windows that overlap by half, and a token is weighed where more lies before it.
    The first `short` tokens, of which a short context has the whole, weigh 1.
    """
    weights = np.ones(len(tokens))
    half = settings.window // 2
    starts = [start for start in range(0, len(tokens), half) if start == 0 or start + half < len(tokens)]
    rows = [tokens[start : start + settings.window] for start in starts]
    rows = [row for row in rows if len(row) - 1 > settings.short]
    for length, numbers in by_length([len(row) - 1 for row in rows], settings.window):
        firsts = [0 if starts[i] == 0 else half - 1 for i in numbers]
        found = losses(reader.evaluator, [rows[i] for i in numbers], settings.short, settings.step, length, firsts)
        for i, first, (before, after) in zip(numbers, firsts, found, strict=True):
            begun = starts[i] + first + 1
            own = longce_weights(before - after, settings.most)[first:]
            weights[begun : begun + len(own)] = own
    return weights
