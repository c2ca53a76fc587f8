"""Config dicts become dataclasses, or an error that a user can act on."""

import dataclasses
from typing import Literal

import ml_collections
import pytest

from lcx.core.config import build, fingerprint, plain, to_config_dict
from lcx.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True)
class Outer:
    size: int
    inner: Inner = Inner()
    names: tuple[str, ...] = ()
    parts: dict[str, Inner] = dataclasses.field(default_factory=dict)
    limit: int | None = None
    either: str | Inner = "x"


def test_builds_nested_values():
    config = ml_collections.ConfigDict({"size": 3, "inner": {"rate": 1}, "names": ["p", "q"], "parts": {"x": {"kind": "b"}}})
    built = build(Outer, config)
    assert built == Outer(3, Inner(1.0), ("p", "q"), {"x": Inner(kind="b")})
    assert isinstance(built.inner.rate, float)


def test_round_trip():
    outer = Outer(2, Inner(0.1, "b"), ("n",), {"x": Inner()}, 4, Inner(0.2))
    assert build(Outer, to_config_dict(outer)) == outer
    assert build(Outer, plain(outer)) == outer


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": 1, "nams": []}, ["config has no field 'nams'", "'names'"]),
        ({"size": 1, "inner": {"rte": 1.0}}, ["config.inner", "'rte'", "'rate'"]),
        ({"size": "big"}, ["config.size='big'", "str", "int"]),
        ({"size": True}, ["config.size=True", "bool"]),
        ({"size": 1.5}, ["config.size=1.5", "float"]),
        ({"size": 1, "inner": {"kind": "c"}}, ["config.inner.kind='c'", "a, b"]),
        ({"size": 1, "names": "p"}, ["config.names='p'", "a list"]),
        ({"size": 1, "names": ["p", 2]}, ["config.names[1]=2"]),
        ({"size": 1, "either": {"rat": 2.0}}, ["config.either", "'rat'", "'rate'"]),
        ({}, ["config needs a value for size"]),
    ],
)
def test_errors_name_field_value_and_way_out(values, words):
    with pytest.raises(UserError) as caught:
        build(Outer, values)
    for word in words:
        assert word in str(caught.value)


def test_fingerprint_follows_every_value():
    assert fingerprint(Outer(1)) == fingerprint(Outer(1))
    assert fingerprint(Outer(1)) != fingerprint(Outer(1, inner=Inner(rate=0.25)))
