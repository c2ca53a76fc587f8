"""From a user's `ConfigDict` to frozen dataclasses, with errors that name field, value, what is allowed and the nearest key."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import ml_collections
from ml_collections.config_dict import placeholder

from lcx.core.errors import UserError

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any] | ml_collections.ConfigDict, path: str = "config") -> T:
    """An instance of the dataclass `cls` from nested mappings; types are checked, never silently converted.

    Lists become tuples, ints are accepted as floats, and nested mappings become nested dataclasses. Raises `UserError`, which
    names `path`, the value and the way out, for unknown keys, missing keys and wrong types. Checks of values belong in the
    dataclass's own `__post_init__`, which may raise `UserError` too.
    """
    values = dict(values.items())
    record: Any = cls
    fields = {field.name: field for field in dataclasses.fields(record) if field.init}
    for key in values:
        if key not in fields:
            raise UserError(f"{path} has no field {key!r}{nearest(key, fields)}")
    hints = _hints(cls)
    built = {key: _convert(hints[key], value, f"{path}.{key}") for key, value in values.items()}
    missing = [
        name
        for name, field in fields.items()
        if name not in built and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{path} is missing a value for {', '.join(missing)}")
    return cls(**built)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields; resolving them takes longer than all else that `build` does."""
    return typing.get_type_hints(cls)


def nearest(key: str, allowed: Iterable[str]) -> str:
    """The end of an error sentence: `; did you mean 'x'?`, all names that begin with `key_`, or all allowed if none is close."""
    allowed = [str(name) for name in allowed]
    begun = [name for name in allowed if name.startswith(f"{key}_")]
    if len(begun) > 1:
        return f"; did you mean {', '.join(map(repr, begun[:-1]))} or {begun[-1]!r}?"
    close = difflib.get_close_matches(key, allowed, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(sorted(allowed)) or 'none'}"


def choice(path: str, value: T, allowed: Iterable[T]) -> T:
    """`value` if it is one of `allowed`; otherwise raises `UserError` naming the nearest allowed value."""
    allowed = list(allowed)
    if value not in allowed:
        raise UserError(f"{path}={value!r} is unknown{nearest(str(value), map(str, allowed))}")
    return value


def positive(path: str, **values: float | None) -> None:
    """Raises `UserError` for the first value that is neither None nor positive."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise UserError(f"{path}.{name}={value!r} must be above 0")


def not_negative(path: str, **values: float) -> None:
    """Raises `UserError` for the first negative value."""
    for name, value in values.items():
        if not value >= 0:
            raise UserError(f"{path}.{name}={value!r} must not be negative")


def to_config_dict(instance: Any) -> ml_collections.ConfigDict:
    """The dataclass as a `ConfigDict` with the same keys, as a starting point for a config file; `build` reads it back.

    A plain None would not tell the flags which type may replace it, so a placeholder of that type is used instead.
    """
    return ml_collections.ConfigDict(_with_placeholders(type(instance), _plain(instance)), type_safe=False)


def _with_placeholders(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    hints, found = typing.get_type_hints(cls), {}
    for key, value in values.items():
        options = _options(hints[key])
        scalars = [option for option in options if option in (int, float, str, bool)]
        nested = next((option for option in options if _is_record(option)), None)
        if value is None and scalars:
            value = placeholder(scalars[0])
        elif nested is not None and isinstance(value, Mapping):
            value = _with_placeholders(nested, value)
        elif (entry := _record_of_entries(options)) is not None and isinstance(value, Mapping):
            value = {name: _with_placeholders(entry, one) for name, one in value.items()}
        found[key] = value
    return found


def _record_of_entries(options: tuple[Any, ...]) -> type | None:
    """The dataclass of a mapping's values, as in `dict[str, PartConfig]`."""
    for option in options:
        if typing.get_origin(option) in (dict, Mapping) and _is_record(typing.get_args(option)[1]):
            return typing.get_args(option)[1]
    return None


def plain(instance: Any) -> Any:
    """Nested dicts, lists and scalars of a dataclass, for JSON."""
    return json.loads(json.dumps(_plain(instance)))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The `(dotted path, value)` pairs of nested mappings and lists, sorted by key; empty ones are leaves."""
    if isinstance(value, Mapping) and value:
        for key in sorted(value):
            yield from leaves(value[key], f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and value:
        for i, item in enumerate(value):
            yield from leaves(item, f"{path}.{i}")
    else:
        yield path, value


def fingerprint(*instances: Any) -> str:
    """Sixteen hex digits that change whenever any value in the instances changes."""
    text = json.dumps([_plain(x) for x in instances], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, ml_collections.ConfigDict):
        return _plain(value.to_dict())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    return value


def _is_record(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint)


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union; any other hint by itself."""
    union = typing.get_origin(hint) is typing.Union or isinstance(hint, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _convert(hint: Any, value: Any, path: str) -> Any:
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    origin = typing.get_origin(hint)
    if len(options := _options(hint)) > 1:
        return _convert_union(options, value, path)
    if origin is typing.Literal:
        return choice(path, value, typing.get_args(hint))
    if hint is Any:
        return value
    if hint is types.NoneType:
        return value if value is None else _wrong(path, value, "None")
    if _is_record(hint):
        if isinstance(value, hint):
            return value
        return build(hint, value, path) if isinstance(value, Mapping) else _wrong(path, value, f"the fields of {hint.__name__}")
    if origin in (tuple, list):
        return _convert_sequence(hint, value, path)
    if origin in (dict, Mapping) or hint is dict:
        if not isinstance(value, Mapping):
            _wrong(path, value, "a mapping")
        item = (typing.get_args(hint) or (str, Any))[1]
        return {str(key): _convert_entry(item, entry, f"{path}.{key}") for key, entry in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    return _wrong(path, value, getattr(hint, "__name__", str(hint)))


def _convert_entry(hint: Any, value: Any, path: str) -> Any:
    """An entry of a mapping, of which there may be many: errors say which, whoever raises them."""
    try:
        return _convert(hint, value, path)
    except UserError as error:
        if path in str(error):
            raise
        raise UserError(f"{path}: {error}") from error


def _convert_union(options: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and types.NoneType in options:
        return None
    errors = []
    for option in options:
        if option is types.NoneType:
            continue
        try:
            return _convert(option, value, path)
        except UserError as error:
            errors.append(error)
    # A mapping or list was meant for the option that accepts such, whose error is about the contents.
    raise errors[-1] if isinstance(value, Mapping | list | tuple) else errors[0]


def _convert_sequence(hint: Any, value: Any, path: str) -> Any:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        _wrong(path, value, "a list")
    items = typing.get_args(hint)
    if len(items) == 2 and items[1] is Ellipsis:
        items = (items[0],) * len(value)
    elif typing.get_origin(hint) is list:
        items = items * len(value)
    elif len(items) != len(value):
        raise UserError(f"{path}={value!r}: expected {len(items)} values, got {len(value)}")
    return typing.get_origin(hint)(
        _convert(item, entry, f"{path}[{i}]") for i, (item, entry) in enumerate(zip(items, value, strict=True))
    )


def _wrong(path: str, value: Any, wanted: str) -> typing.NoReturn:
    raise UserError(f"{path}={value!r}: expected {wanted}, got {type(value).__name__}")
