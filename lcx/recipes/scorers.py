"""The kinds of scores of documents that take a model, for `lcx data curate`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from lcx.core import configs
from lcx.core.errors import UserError
from lcx.data.curation.scores import ScoreConfig, ScorerFactory
from lcx.recipes.dependency import EntropyDrop, Ladm, Lds, LongAttn
from lcx.recipes.likelihood import LikelihoodRatio, LossPerByte
from lcx.recipes.reader import ModelScore, Reader, ReaderConfig

KINDS: dict[str, type[ModelScore]] = {one.kind: one for one in (Lds, EntropyDrop, Ladm, LongAttn, LossPerByte)}


def factories() -> dict[str, ScorerFactory]:
    """The kinds of scores by name; a model that several scores name is loaded once.

    `ScoreConfig.settings` are those of `ReaderConfig` and of the kind. `likelihood_ratio` has those of `loss_per_byte`, and a
    second model under `other`. Factories raise `UserError` for settings that a kind does not have.
    """
    load = functools.cache(Reader.load)

    def parts(kind: str, path: str, settings: dict[str, Any]) -> tuple[Reader, Any]:
        names = {field.name for field in dataclasses.fields(ReaderConfig)}
        of_kind = {key: value for key, value in settings.items() if key not in names}
        own = configs.build(KINDS[kind].settings_class, of_kind, path)
        return load(configs.build(ReaderConfig, {key: value for key, value in settings.items() if key in names}, path)), own

    def ratio(score: ScoreConfig) -> LikelihoodRatio:
        settings, path = dict(score.settings), "settings of kind='likelihood_ratio'"
        if not (other := settings.pop("other", None)):
            raise UserError(f"{path} is missing a value for other, the model to compare with")
        models = (settings, {**settings, "model": other, "stage": None})
        one, two = (LossPerByte(*parts("loss_per_byte", path, each)) for each in models)
        return LikelihoodRatio(one, two)

    def single(kind: str) -> ScorerFactory:
        return lambda score: KINDS[kind](*parts(kind, f"settings of kind={kind!r}", score.settings))

    return {**{kind: single(kind) for kind in KINDS}, "likelihood_ratio": ratio}
