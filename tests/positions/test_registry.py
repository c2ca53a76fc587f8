import ml_collections
import pytest

from lcx.core.errors import UserError
from lcx.positions.absolute import Learned
from lcx.positions.piecewise import DualChunk
from lcx.positions.query_scaling import QueryScaling
from lcx.positions.registry import ALIASES, SCHEMES, fingerprint, from_config, to_config
from lcx.positions.rotary import Linear, Rope
from lcx.positions.scaling import LongRope, Yarn
from lcx.positions.scheme import Heads

HEADS = Heads(num_heads=4, num_kv_heads=2, head_dim=16, model_dim=64)
# A text for every row of the table.
TEXTS = {
    "rope": "rope:theta=500,layout=interleaved,partial=0.5",
    "linear": "linear:factor=16",
    "ntk": "ntk:factor=16",
    "dynamic": "dynamic:factor=2,original_length=32",
    "ntk_by_parts": "ntk_by_parts:original_length=32",
    "yarn": "yarn:factor=16,original_length=32,variant=paper,temperature=llama4",
    "llama3": "llama3:factor=8,theta=5e5",
    "longrope": "longrope:short_factor=[1,1,1,1,1,1,1,1.5],long_factor=[2,2,2,2,2,2,2,2],original_length=32",
    "proportional": "proportional:partial=0.5",
    "xpos": "xpos:scale_base=1024",
    "self_extend": "self_extend:window=8,group=4,temperature.kind=log_n,temperature.length=8",
    "rerope": "rerope:window=8",
    "leaky_rerope": "leaky_rerope:window=8,k=4",
    "dual_chunk": "dual_chunk:original_length=32,theta=500,scaling=yarn",
    "alibi": "alibi",
    "t5": "t5:buckets=16",
    "kerple": "kerple:r1=0.5",
    "fire": "fire:width=8",
    "nope": "nope:temperature=llama4",
    "sinusoidal": "sinusoidal:scale=0.1",
    "learned": "learned:max_length=64",
}


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_from_text_to_arrays_and_back(name):
    scheme = from_config(TEXTS[name])
    assert type(scheme) is SCHEMES[name] and scheme.name == name
    spec, buffers, specs = scheme.spec(64), scheme.buffers(HEADS, 64), scheme.param_specs(HEADS, 64)
    assert hash(spec) == hash(from_config(TEXTS[name]).spec(64))
    assert set(spec.rotations) == set(buffers.get("rotations", {}))
    assert (spec.query_scale is not None) == ("query_scale" in buffers)
    assert spec.bias is not None or "bias" not in buffers
    assert not specs or spec.bias is not None or spec.embed is not None
    config = to_config(scheme)
    assert from_config(config) == from_config(ml_collections.ConfigDict(config)) == scheme
    assert fingerprint(scheme) == fingerprint(from_config(config))


def test_texts_cover_the_table():
    assert set(TEXTS) == set(SCHEMES) and set(ALIASES.values()) <= set(SCHEMES)


def test_settings_arrive():
    assert from_config("yarn:factor=16,theta=500") == Yarn(factor=16.0, theta=500.0)
    assert from_config("pi:factor=4") == Linear(factor=4.0) and from_config("none") == Rope()
    assert from_config(TEXTS["dual_chunk"]) == DualChunk(
        original_length=32, theta=500.0, scaling=Yarn(theta=500.0, original_length=32)
    )
    assert from_config(TEXTS["self_extend"]).temperature == QueryScaling("log_n", length=8)
    assert isinstance(from_config(TEXTS["longrope"]), LongRope) and from_config(TEXTS["longrope"]).short_factor[-1] == 1.5
    assert from_config(Rope(theta=7.0)) == Rope(theta=7.0)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ("yarm:factor=16", "did you mean 'yarn'"),
        ("yarn:facotr=16", "did you mean 'factor'"),
        ("yarn:factor", "not key=value"),
        ("yarn:factor=big", "factor='big'"),
        ("yarn:factor=16,factor.x=2", "both a value and settings"),
        ("rope:theta=-5", "theta=-5"),
        ({"theta": 500.0}, "has no name"),
        (7, "is not a scheme"),
        ("learned", "is missing a value for max_length"),
        ("rope:temperature=llama5", "llama4"),
        ("dual_chunk:original_length=32,scaling=alibi", "scaling"),
        ("dual_chunk:original_length=32,scaling=4", "positions.scaling=4 is not a scheme; use a mapping"),
        ({"name": ["yarn"]}, "name"),
    ],
)
def test_what_is_no_scheme_is_named(values, says):
    with pytest.raises(UserError, match=says):
        from_config(values)


def test_learned_table_has_an_end():
    with pytest.raises(UserError):
        Learned(max_length=8).spec(9)
