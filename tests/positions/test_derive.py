"""What a scheme made from another keeps and changes."""

import pytest

from lcx.core.errors import UserError
from lcx.positions.absolute import Nope
from lcx.positions.derive import extend, with_theta
from lcx.positions.piecewise import SelfExtend
from lcx.positions.query_scaling import QueryScaling
from lcx.positions.registry import from_config
from lcx.positions.rotary import Ntk, Rope
from lcx.positions.scaling import Yarn
from tests.positions.test_registry import TEXTS


def test_with_theta():
    assert with_theta(Yarn(factor=4.0), 500.0) == Yarn(factor=4.0, theta=500.0)
    scheme = with_theta(from_config(TEXTS["dual_chunk"]), 9.0)
    assert scheme.theta == scheme.scaling.theta == 9.0
    with pytest.raises(UserError, match="'nope' has no theta"):
        with_theta(Nope(), 500.0)


def test_extend_keeps_the_trained_model():
    trained = Rope(theta=500.0, layout="interleaved", partial=0.5, original_length=256, temperature=QueryScaling("llama4"))
    kept = {key: getattr(trained, key) for key in ("theta", "layout", "partial", "original_length", "temperature")}
    assert extend(trained, "yarn:factor=16") == Yarn(factor=16.0, **kept)
    assert extend(trained, "rope:theta=8000").theta == 8000
    assert extend(trained, {"name": "ntk", "factor": 4}) == Ntk(factor=4.0, **kept)
    assert extend(Rope(), "yarn", trained_length=256).original_length == 256
    assert extend(trained, "self_extend:window=64,group=4") == SelfExtend(window=64, group=4, **kept)
    inner = extend(trained, "dual_chunk:scaling=yarn").scaling
    assert (inner.theta, inner.original_length, inner.partial) == (500.0, 256, 0.5)
    assert extend(Nope(), "alibi").name == "alibi"
    assert extend(extend(trained, "dual_chunk:scaling=yarn"), "rope").theta == 500


def test_extend_starts_from_the_longest_trained_length():
    """A new theta alone leaves the length that a model came with in its scheme, however far it was trained since."""
    came = Rope(original_length=8192, temperature=QueryScaling("log_n"))
    dynamic = extend(came, "dynamic", trained_length=65536)
    assert (dynamic.original_length, dynamic.stretch(131072)) == (65536, 2)
    assert extend(came, "dual_chunk:scaling=yarn", trained_length=65536).sizes()[0] == 65536
    assert extend(came, "yarn", trained_length=4096).original_length == 8192
    assert extend(came, "yarn:original_length=4096", trained_length=65536).original_length == 4096
    assert dynamic.temperature == QueryScaling("log_n", length=8192)  # as it was trained
    assert extend(came, "yarn", trained_length=4096).temperature == came.temperature
    for depends in ("yarn:factor=8", "dual_chunk"):
        assert extend(extend(came, depends), "dynamic", trained_length=65536).original_length == 8192


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("proportional:partial=0.25", "yarn:factor=4,original_length=64"),
        ("rope:partial=0.25", "p_rope"),
        ("rope:partial=0.25", "dual_chunk:scaling=proportional"),
        ("proportional:partial=0.25", "dual_chunk"),
        ("dual_chunk:partial=0.25,scaling=proportional", "rope"),
    ],
)
def test_partial_of_p_rope_is_not_that_of_others(old, new):
    scheme = from_config(old)
    with pytest.raises(UserError, match="partial=0.25 of .* and of .* turn different dims.*name one"):
        extend(scheme, new)
    assert extend(scheme, new + (",partial=1" if ":" in new else ":partial=1")).partial == 1
    assert extend(with_theta(from_config(old.replace("0.25", "1")), 500.0), new).theta == 500


def test_partial_of_p_rope_stays_in_p_rope():
    scheme = from_config("proportional:partial=0.25")
    assert extend(scheme, "p_rope:theta=500").partial == 0.25
    assert extend(scheme, "dual_chunk:scaling=proportional").scaling.partial == 0.25
