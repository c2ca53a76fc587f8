"""Config dicts become dataclasses, or an error that a user can act on."""

import dataclasses
from typing import Literal

import ml_collections
import pytest

from lcx.core.configs import build, fingerprint, plain, to_config_dict
from lcx.core.errors import UserError
from lcx.recipes.recipe import defaults, part, recipe


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    cap: int | None = None

    def __post_init__(self):
        if self.rate < 0:
            raise UserError(f"inner.rate={self.rate} must not be negative")


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
        ({}, ["config is missing a value for size"]),
    ],
)
def test_errors_name_field_value_and_way_out(values, words):
    with pytest.raises(UserError) as caught:
        build(Outer, values)
    for word in words:
        assert word in str(caught.value)


def test_errors_of_one_entry_among_many_say_which():
    with pytest.raises(UserError, match=r"^config\.parts\.x: inner\.rate=-1\.0 must not be negative$"):
        build(Outer, {"size": 3, "parts": {"a": {}, "x": {"rate": -1.0}}})
    with pytest.raises(UserError, match=r"^config\.parts\.x has no field 'rat'; did you mean 'rate'\?$"):
        build(Outer, {"size": 3, "parts": {"x": {"rat": 1}}})


def test_fingerprint_follows_every_value():
    assert fingerprint(Outer(1)) == fingerprint(Outer(1))
    assert fingerprint(Outer(1)) != fingerprint(Outer(1, inner=Inner(rate=0.25)))


def test_nothing_stands_where_a_flag_could_put_a_value():
    config = to_config_dict(Outer(size=3))
    assert config.limit is None and config.get_type("limit") is int
    config.limit = 4
    assert build(Outer, config) == Outer(size=3, limit=4)
    nested = to_config_dict(Outer(size=3, parts={"x": Inner()})).parts.x
    assert nested.cap is None and nested.get_type("cap") is int


def test_no_field_of_a_config_is_hidden_by_a_method_of_its_dict():
    """`--config.x.items=1` would find the method."""
    config = defaults({"base": {"seq_len": 8, "steps": 1, "batch_size": 1}})
    config.data.parts = {"text": part()}
    methods = set(dir(ml_collections.ConfigDict))

    def keys(tree):
        for key, value in tree.items():
            yield key
            if isinstance(value, ml_collections.ConfigDict):
                yield from keys(value)

    found = list(keys(config))
    assert {"needle_items", "max_position", "limit_bytes"} <= set(found)
    assert not methods & set(found)


def test_stages_run_in_the_order_in_which_they_are_given():
    sizes = {"seq_len": 8, "steps": 1, "batch_size": 1}
    config = defaults({"second_by_name": sizes, "first_by_name": sizes})
    assert [stage.name for stage in recipe(config).run.stages] == ["second_by_name", "first_by_name"]
