import importlib.util
import json

import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.positions import angles, hf
from lcx.positions.absolute import Nope
from lcx.positions.query_scaling import QueryScaling
from lcx.positions.rotary import Linear, Ntk, Rope
from lcx.positions.scaling import Dynamic, Llama3, LongRope, NtkByParts, Proportional, Yarn
from lcx.positions.scheme import Heads
from tests.positions.make_hf_fixtures import CASES, FIXTURES, reference

REFERENCES = json.loads(FIXTURES.read_text())["cases"]
INDICES = [0, 1, 16, 21, 30, 32, 46, 63]


def scheme_of(name):
    parameters, head_dim, max_positions, length = CASES[name]
    return hf.from_hf({"rope_parameters": parameters, "max_position_embeddings": max_positions}), head_dim, length


def agrees(name, wanted):
    scheme, head_dim, length = scheme_of(name)
    np.testing.assert_allclose(scheme.inverse_frequencies(head_dim, length), wanted["inv_freq"], rtol=1e-6, atol=0)
    assert scheme.amplitude(length) == pytest.approx(wanted["attention_factor"], rel=1e-6)
    # What the device gets is what was compared.
    rotation = scheme.buffers(Heads(4, 4, head_dim, 4 * head_dim), length)["rotations"]["rotary"]
    np.testing.assert_allclose(angles.decode(rotation.hi, rotation.lo), wanted["inv_freq"], rtol=1e-6, atol=1e-18)
    assert float(rotation.amplitude) == pytest.approx(wanted["attention_factor"], rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_frequencies_against_transformers(name):
    agrees(name, REFERENCES[name])
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        agrees(name, reference(name))


@pytest.mark.parametrize("name", CASES)
def test_a_scheme_survives_the_way_to_hugging_face_and_back(name):
    scheme, head_dim, length = scheme_of(name)
    back = hf.from_hf({"rope_parameters": hf.to_hf(scheme), "max_position_embeddings": scheme.original_length})
    np.testing.assert_array_equal(back.inverse_frequencies(head_dim, length), scheme.inverse_frequencies(head_dim, length))
    assert back.amplitude(length) == scheme.amplitude(length)


@pytest.mark.parametrize(
    ("scheme", "length", "wanted"),
    [
        (
            Llama3(theta=5e5),
            8192,
            [1, 0.814617217, 0.0376060307, 0.0134904198, 0.00137189368, 0.000524846022, 1.00178686e-5, 3.06892588e-7],
        ),
        (
            Yarn(theta=1e4, factor=4.0, original_length=4096),
            16384,
            [1, 0.865964353, 0.1, 0.0472920388, 0.00948851742, 0.00653846189, 3.33380362e-4, 2.88695483e-5],
        ),
    ],
)
def test_published_frequencies(scheme, length, wanted):
    np.testing.assert_allclose(scheme.inverse_frequencies(128, length)[INDICES], wanted, rtol=1e-6)


def test_published_values_of_yarn_dynamic_and_ntk():
    assert Yarn(factor=4.0, original_length=4096).amplitude(1) == pytest.approx(1.138629436, rel=1e-9)
    dynamic = Dynamic(factor=4.0, original_length=4096).inverse_frequencies(128, 16384)
    np.testing.assert_allclose(dynamic[[1, 63]], [0.831415951, 8.88293835e-6], rtol=1e-6)
    ntk = Ntk(factor=4.0).inverse_frequencies(128, 1)
    assert ntk[1] ** -64 == pytest.approx(40890, rel=1e-3)
    assert ntk[63] == pytest.approx(Rope().inverse_frequencies(128, 1)[63] / 4, rel=1e-12)


def test_yarn_of_the_paper_ramps_over_turns():
    plain = Rope().inverse_frequencies(128, 1)
    for scheme in (Yarn(factor=4.0, original_length=4096, variant="paper"), NtkByParts(factor=4.0, original_length=4096)):
        ratio = scheme.inverse_frequencies(128, 1) / plain
        kept, divided = np.sum(ratio > 1 - 1e-12), np.sum(ratio < 0.25 + 1e-12)
        assert (kept, 64 - kept - divided, divided) == (21, 25, 18)
        assert ratio[30] == pytest.approx(0.436, abs=5e-4)
    assert (Yarn(factor=4.0, original_length=4096).inverse_frequencies(128, 1) / plain)[30] == pytest.approx(0.7115, abs=5e-5)
    assert NtkByParts(factor=4.0, original_length=4096).amplitude(1) == 1


def test_deepseek_scales_the_softmax_where_asked():
    scheme = Yarn(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0, scale_softmax=True)
    assert scheme.amplitude(1) == 1
    gain = scheme.buffers(Heads(1, 1, 64, 64), 1)["query_scale"]["gain"]
    assert float(gain) == pytest.approx((0.1 * np.log(40) + 1) ** 2, rel=1e-6)


def test_older_and_nested_configs():
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5}
    assert hf.from_hf(old) == Linear(theta=5e5, factor=2.0, partial=0.5)
    assert hf.from_hf({"rope_theta": 1e6, "rope_scaling": None, "max_position_embeddings": 32768}) == Rope(
        theta=1e6, original_length=32768
    )
    gemma = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert hf.from_hf(gemma) == {"full_attention": Linear(theta=1e6, factor=8.0), "sliding_attention": Rope(theta=1e4)}
    nested = {
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "chunked_attention": None,
        }
    }
    schemes = hf.from_hf(nested)
    assert schemes == {
        "full_attention": Proportional(theta=1e6, partial=0.25),
        "sliding_attention": Rope(theta=1e4),
        "chunked_attention": Nope(),
    }
    assert hf.from_hf({"rope_parameters": hf.to_hf(schemes)}) == schemes
    phi = {
        "rope_theta": 1e4,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    }
    scheme = hf.from_hf(phi)
    assert isinstance(scheme, LongRope) and (scheme.factor, scheme.original_length) == (32, 4096)
    ministral = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384, "llama_4_scaling_beta": 0.1}
    scheme = hf.from_hf({"rope_parameters": ministral, "max_position_embeddings": 262144})
    assert scheme.temperature == QueryScaling("ministral", 0.1, 16384)
    assert scheme.to_hf()["llama_4_scaling_beta"] == 0.1


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"rope_parameters": {"rope_type": "yarm", "factor": 2.0}}, "did you mean 'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, "mrope"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_theta": -1.0}, "theta=-1.0"),
    ],
)
def test_configs_that_cannot_be_read(config, says):
    with pytest.raises(UserError, match=says):
        hf.from_hf(config)


@pytest.mark.parametrize(
    "scheme",
    [
        Nope(),
        Ntk(factor=2.0),
        NtkByParts(factor=2.0, original_length=64),
        Yarn(factor=2.0, original_length=64, variant="paper"),
        Linear(original_length=64),
        Rope(temperature=QueryScaling("llama4")),
    ],
)
def test_schemes_that_hugging_face_lacks_are_refused(scheme):
    with pytest.raises(UserError):
        scheme.to_hf()
