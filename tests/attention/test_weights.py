"""The attention matrix over the product of options: with it the values' averages are those that attention gives."""

import jax.numpy as jnp
import numpy as np
import pytest

from lcx.attention.attend import attend
from lcx.attention.spec import AttentionSpec
from lcx.attention.weights import attention_weights
from lcx.core.mask import visible
from lcx.positions.rotary import tables
from tests.attention import cases
from tests.covering import pairwise


@pytest.mark.parametrize("case", pairwise(cases.OPTIONS), ids=lambda case: "-".join(map(str, case.values())))
def test_weights_average_the_values_as_attention_does(case):
    scheme = cases.scheme_of(case["pieces"], case["bias"])
    spec = AttentionSpec(cases.MASKS[case["mask"]], scheme, scale=0.5, softcap=case["softcap"], kernel="dense")
    where, inputs = cases.index(case["segments"], case["positions"]), cases.inputs_of(case)
    turned = tables(scheme, cases.SCHEMES[case["pieces"]].buffers(cases.HEADS, cases.T), where.positions)
    scales = jnp.linspace(0.5, 2.0, cases.B * cases.T).reshape(cases.B, cases.T)
    options = {"q_tables": turned, "k_tables": turned, "bias_params": inputs["bias"], "sinks": inputs.get("sinks")}
    options["query_scale"] = scales
    weights = attention_weights(spec, inputs["q"], inputs["k"], where, where, **options)
    values = jnp.repeat(inputs["v"], cases.N // inputs["v"].shape[2], axis=2)
    wanted = attend(spec, inputs["q"], inputs["k"], inputs["v"], where, where, **options)
    np.testing.assert_allclose(jnp.einsum("bnts,bsnh->btnh", weights, values), wanted, atol=3e-6)
    seen = np.asarray(visible(spec.mask, where, where))
    assert np.all(np.where(seen[:, None], 0, weights) == 0)
    sums, sees = np.asarray(weights).sum(-1), np.broadcast_to(seen.any(-1)[:, None], weights.shape[:3])
    np.testing.assert_allclose(sums[~sees], 0, atol=0)
    assert np.all(sums[sees] < 1) if case["sink"] else np.allclose(sums[sees], 1, atol=1e-5)
