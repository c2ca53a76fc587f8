"""Which tensors of which models each tensor of the result is made of, and with which parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lcx.core.configs import nearest
from lcx.core.errors import UserError
from lcx.merging.config import MergeConfig, SliceConfig, SourceConfig
from lcx.merging.methods.method import Method, Values
from lcx.merging.methods.table import METHODS
from lcx.merging.models import LAYER, Model
from lcx.merging.parameters import Parameter, Setting, parse
from lcx.merging.writer import Stored

FIRST = ("embed", "wte", "wpe")
"""Parts of the names of tensors that come before the first layer; others outside the layers come after the last."""

NO_EFFECT = ("int8_mask",)
"""Parameters of mergekit that change how it computes, not what."""

ALL = {name for method in METHODS.values() for name in method.parameters}


Settings = Sequence[Mapping[str, Setting]]
"""The parameters of several places in the file, those that count most first."""


@dataclasses.dataclass(frozen=True)
class Input:
    """A tensor of a model."""

    model: Model
    name: str


@dataclasses.dataclass(frozen=True)
class Job:
    """One tensor of the result: how it is called and stored, what it is made of, and the values of the method's parameters."""

    name: str
    stored: Stored
    models: tuple[Input, ...]
    base: Input | None
    values: Values


@dataclasses.dataclass(frozen=True)
class Plan:
    """All tensors of the result in the order in which they are written; its layers as pairs of model and layer."""

    method: Method
    jobs: list[Job]
    layers: list[tuple[Model, int]]
    unused: list[str]
    """Parameters of the file that this method does not look at."""

    @property
    def numbers(self) -> int:
        """How many numbers are written."""
        return sum(math.prod(job.stored.shape) for job in self.jobs)


@dataclasses.dataclass(frozen=True)
class _Source:
    """Some layers of a model within a slice, with the settings that count for it, the strongest first."""

    model: Model
    first: int
    settings: Settings


class PlanBuilder:
    """Makes the plan of a merge of `models` (by their names in the file)."""

    def __init__(self, config: MergeConfig, models: Mapping[str, Model]):
        self.config, self.models = config, models
        self.method = METHODS[config.merge_method]
        self.base = None if config.base_model is None or self.method.base == "none" else models[config.base_model]
        if self.base is None and self.method.base == "needed":
            raise UserError(f"merge_method={config.merge_method} needs base_model; name the model that the others are relative to")
        self.unused: list[str] = []
        self._global = self._settings("parameters", config.parameters, own=False)

    def plan(self) -> Plan:
        """The plan; raises `UserError` for tensors that do not fit together and parameters that are missing."""
        jobs: list[Job] = []
        layers: list[tuple[Model, int]] = []
        slices = list(self._slices())
        for path, count, of_slice, sources in slices:
            base, models = self._roles(path, sources)
            settings = [*of_slice, self._global]
            if not layers:
                jobs += self._outside(base, models, settings, first=True)
            for i in range(count):
                place = i / (count - 1) if count > 1 else 1.0
                jobs += self._layer(base, models, settings, i, len(layers) + i, place)
            layers += [((base or models[0]).model, (base or models[0]).first + i) for i in range(count)]
        jobs += self._outside(base, models, settings, first=False)
        return Plan(self.method, jobs, layers, list(dict.fromkeys(self.unused)))

    def _slices(self) -> Iterator[tuple[str, int, Settings, list[_Source]]]:
        """Of each slice: its place in the file, number of layers, settings for all its models, sources."""
        if self.config.models is not None:
            sources = [
                _Source(self.models[one.model], 0, [self._settings(f"models[{i}].parameters", one.parameters, own=True)])
                for i, one in enumerate(self.config.models)
            ]
            yield "models", sources[0].model.layers, (), sources
        for i, one in enumerate(self.config.slices or ()):
            of_slice = [self._settings(f"slices[{i}].parameters", one.parameters, own=False)]
            sources = [self._source(f"slices[{i}].sources[{j}]", source) for j, source in enumerate(one.sources)]
            yield f"slices[{i}].sources", _length(one), of_slice, sources

    def _source(self, path: str, source: SourceConfig) -> _Source:
        model, (start, stop) = self.models[source.model], source.layer_range
        if not 0 <= start < stop <= model.layers:
            raise UserError(
                f"{path}.layer_range=[{start}, {stop}] does not lie within the {model.layers} layers of {model.name}; "
                f"give a first layer and, above it, an end of at most {model.layers}"
            )
        return _Source(model, start, [self._settings(f"{path}.parameters", source.parameters, own=True)])

    def _roles(self, path: str, sources: Sequence[_Source]) -> tuple[_Source | None, list[_Source]]:
        """Which source is the base (one that is not listed has the layers of the others), and which are merged."""
        base, models = None, list(sources)
        if self.base is not None:
            listed = [source for source in sources if source.model is self.base]
            models = [source for source in sources if source.model is not self.base]
            if len(firsts := {source.first for source in sources}) > 1 and not listed:
                raise UserError(
                    f"{path} begin at layers {sorted(firsts)}, so it is open which of the base's layers are meant; "
                    f"list {self.base.name} with its layer_range as well"
                )
            base = listed[0] if listed else _Source(self.base, sources[0].first, [])
        least, most = self.method.least, self.method.most
        if len(models) < least or most is not None and len(models) > most:
            plural = "s" * (least != 1 or most is not None and most > 1)
            wanted = f"{least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            relative = " beside base_model" if self.base is not None else ""
            names = ", ".join(source.model.name for source in models) or "none"
            raise UserError(
                f"{path}: merge_method={self.config.merge_method} takes {wanted} model{plural}{relative} but got "
                f"{len(models)} ({names}); change the list"
            )
        return base, models

    def _layer(
        self,
        base: _Source | None,
        models: Sequence[_Source],
        settings: Settings,
        i: int,
        number: int,
        place: float,
    ) -> Iterator[Job]:
        first = base or models[0]
        tensors = [source.model.layer(source.first + i) for source in models]
        of_base = None if base is None else base.model.layer(base.first + i)
        reference = first.model.layer(first.first + i)
        for source, found in zip(models, tensors, strict=True):
            where = f"layer {source.first + i} of {source.model.name}", f"layer {first.first + i} of {first.model.name}"
            _same_names(*where, found, reference)
        for key in reference:
            inputs = [Input(source.model, found[key]) for source, found in zip(models, tensors, strict=True)]
            with_base = None if of_base is None or base is None else Input(base.model, of_base[key])
            yield self._job(key.replace("*", str(number), 1), inputs, with_base, models, settings, place)

    def _outside(self, base: _Source | None, models: Sequence[_Source], settings: Settings, first: bool) -> Iterator[Job]:
        """Tensors outside the layers, before or after them."""
        reference = base or models[0]
        for source in models:
            _same_names(source.model.name, reference.model.name, source.model.others, reference.model.others)
        for name in reference.model.others:
            if any(part in name for part in FIRST) == first:
                inputs = [Input(source.model, name) for source in models]
                with_base = None if base is None else Input(base.model, name)
                yield self._job(name, inputs, with_base, models, settings, 0.0)

    def _job(
        self, name: str, inputs: Sequence[Input], base: Input | None, models: Sequence[_Source],
        settings: Settings, place: float,
    ) -> Job:  # fmt: skip
        reference = base or inputs[0]
        shape = reference.model.shapes[reference.name]
        for one in inputs:
            if (other := one.model.shapes[one.name]) != shape:
                raise UserError(
                    f"{one.name} has the shape {list(other)} in {one.model.name} and {list(shape)} in {reference.model.name}; "
                    "choose models of one architecture and vocabulary"
                )
        of_tensor = {
            key: _value(key, parameter, settings, name, place)
            for key, parameter in self.method.parameters.items()
            if not parameter.each
        }
        of_models = []
        for source in models:
            found = {
                key: _value(key, self.method.parameters[key], [*source.settings, *settings], name, place, source.model.name)
                for key in self.method.of_models
            }
            of_models.append(found)
        stored = [one.model.reader.shards.dtype(one.name) for one in (reference, *inputs)]
        return Job(name, Stored(shape, self.config.out or stored[0]), tuple(inputs), base, Values(of_tensor, tuple(of_models)))

    def _settings(self, path: str, given: Mapping[str, Any] | None, own: bool) -> dict[str, Setting]:
        """The parameters at one place of the file; `own`: of a single model."""
        found = {}
        for key, value in (given or {}).items():
            if key in self.method.parameters:
                parameter = self.method.parameters[key]
                if own and not parameter.each:
                    raise UserError(f"{path}.{key}={value!r} is one for all models; move it to the parameters of the whole merge")
                found[key] = parse(f"{path}.{key}", value, parameter)
            elif key in NO_EFFECT or key in ALL:
                self.unused.append(f"{path}.{key}")
            else:
                raise UserError(f"{path} has no field {key!r}{nearest(key, self.method.parameters)}")
        return found


def _value(key: str, parameter: Parameter, settings: Settings, name: str, place: float, model: str | None = None) -> Any:
    """A parameter for one tensor: of the first setting that has one for it, else the default."""
    for found in settings:
        if key in found and (value := found[key].at(name, place)) is not None:
            return value
    if parameter.default is None:
        of = "" if model is None else f" of {model}"
        raise UserError(
            f"the parameter {key}{of} is missing for {name}; give {key} in its parameters or in those of the whole merge"
        )
    return parameter.default


def _same_names(
    where: str, reference: str, found: Mapping[str, Any] | Sequence[str], wanted: Mapping[str, Any] | Sequence[str]
) -> None:
    for key in wanted:
        if key not in found:
            raise UserError(f"{where} has no {key}, which {reference} has; choose models of one architecture")
    for key in found:
        if key not in wanted:
            raise UserError(f"{reference} has no {key}, which {where} has; choose models of one architecture")


def _length(one: SliceConfig) -> int:
    start, stop = one.sources[0].layer_range
    return stop - start


def kind(name: str) -> str:
    """A tensor's name without its layer's number."""
    found = LAYER.fullmatch(name)
    return f"{found['before']}*{found['after']}" if found else name
