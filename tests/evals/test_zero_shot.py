import pytest

from lcx.core.errors import UserError
from lcx.evals.zero_shot import at_length, check
from lcx.positions.registry import from_config
from lcx.positions.theta import critical_base

BASE = {"global": from_config("rope:theta=500")}


def one(spec: str, length: int, trained: int = 256):
    return at_length(BASE, spec, trained, length)["global"]


def test_none_is_the_checkpoint_as_it_was_trained():
    assert at_length(BASE, "none", 256, 4096) == BASE


@pytest.mark.parametrize("name", ["linear", "ntk", "yarn"])
def test_the_factor_follows_the_length_unless_named(name):
    scheme = one(name, 4096)
    assert scheme.name == name and scheme.theta == 500 and scheme.factor == 16
    assert one(name, 128).factor == 1
    assert one(f"{name}:factor=8", 4096).factor == 8


def test_what_the_scheme_needs_of_the_trained_model_is_kept():
    assert one("yarn", 1024).original_length == 256
    assert one("yarn:original_length=512,theta=800", 1024).theta == 800
    assert one("pi", 1024) == one("linear", 1024)


def test_theta_may_be_the_critical_base():
    assert one("rope:theta=critical", 4096).theta == pytest.approx(critical_base(500, 256, 4096))
    assert one("rope:theta=critical", 256).theta == 500
    assert one("rope:theta=900", 4096).theta == 900


def test_layers_under_a_window_keep_their_scheme():
    schemes = {**BASE, "local": from_config("rope:theta=100")}
    changed = at_length(schemes, "linear", 256, 1024)
    assert changed["local"] == schemes["local"] and changed["global"].factor == 4


def test_wrong_specs_are_answered():
    with pytest.raises(UserError, match="did you mean 'yarn'"):
        check("yarm")
    with pytest.raises(UserError, match="did you mean 'linear'"):
        one("linea", 512)
    with pytest.raises(UserError, match="has no theta to start from"):
        at_length({"global": from_config("nope")}, "rope:theta=critical", 256, 512)
    assert check("none") == "none" and check("pi") == "pi"
