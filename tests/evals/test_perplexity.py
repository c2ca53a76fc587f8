import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.core.batch import Batch
from lcx.core.errors import UserError
from lcx.core.param_spec import initialize
from lcx.data.sources.sources import InMemorySource, Subset
from lcx.data.tokenizers.tokenizers import Bytes
from lcx.evals.perplexity import bytes_per_token, cover, loss_by_position, perplexity, spans
from lcx.evals.scoring import Scores, model_scorer, score_rows
from lcx.model.architecture import build_architecture, build_schemes
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.model.loss import logits
from lcx.model.params import specs
from lcx.model.transformer import hidden_states

CONFIG = ModelConfig(vocab_size=64, model_dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64)


def documents(*lengths: int) -> Subset:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 64, length) for length in lengths]
    source = InMemorySource([f"d{i}" for i in range(len(lengths))], tokens, list(range(len(lengths))), 64)
    return Subset(source, np.arange(len(lengths)))


def flat(documents: Subset) -> np.ndarray:
    return documents.windows(np.array([0]), documents.num_tokens)[0]


def test_spans_lie_in_one_document_each_and_take_every_document_first():
    held = documents(40, 100, 20, 33)
    text, joined = spans(held, 32, 4, seed=3)
    assert not joined and text.shape == (4, 33)
    stream = flat(held)
    starts = [next(i for i in range(len(stream) - 32) if np.array_equal(stream[i : i + 33], row)) for row in text]
    bounds = held.cumulative
    owners = [int(np.searchsorted(bounds, start, "right") - 1) for start in starts]
    assert all(bounds[o] <= s and s + 33 <= bounds[o + 1] for o, s in zip(owners, starts, strict=True))
    assert sorted(owners[:3]) == [0, 1, 3]
    assert np.array_equal(spans(held, 32, 4, seed=3)[0], text)
    assert len(np.unique(starts)) == 4


def test_spans_join_documents_only_where_none_is_long_enough():
    held = documents(30, 30, 30)
    text, joined = spans(held, 40, 5)
    assert joined and text.shape == (2, 41)
    with pytest.raises(UserError, match="hold 90 tokens but evals.lengths needs 100"):
        spans(held, 100, 1)


@pytest.mark.parametrize(
    ("span", "length", "stride"), [(64, 64, 64), (64, 16, 16), (64, 16, 4), (64, 24, 24), (65, 16, 7), (9, 8, 8)]
)
def test_windows_cover_each_token_once(span, length, stride):
    counted = np.zeros(span, int)
    for start, first in cover(span, length, stride):
        assert start >= 0 and start + length <= span and 0 <= first < length
        counted[start + first : start + length] += 1
    assert np.all(counted == 1)
    assert cover(span, length, stride)[-1][0] == span - length


def test_equals_a_direct_computation_with_dense_attention():
    """Windows of every length against log-probabilities made token by token from full logits."""
    schemes = build_schemes(CONFIG, {"default": "rope:theta=100"})
    params = initialize(specs(CONFIG, schemes, 64), jax.random.key(1))
    params = jax.tree.map(lambda x: 3 * x, params)  # far from uniform
    text = np.random.default_rng(2).integers(0, 64, (3, 65)).astype(np.int32)

    def built(kernel, length):
        return build_architecture(CONFIG, ExecutionConfig(attention=kernel), schemes, length)

    curve = perplexity(
        lambda n: model_scorer(params, *built("blockwise", n)), text, [16, 64], stride=16, final=5, tokens_per_forward=100
    )
    for point in curve.points:
        arch, buffers = built("dense", point.length)
        full = jax.jit(lambda buffers, batch, arch=arch: logits(params, hidden_states(params, buffers, arch, batch)[0], CONFIG))
        wanted, final = np.zeros((3, 64)), None
        for start, first in cover(64, point.length, min(16, point.length)):
            batch = Batch.from_tokens(text[:, start : start + point.length + 1])
            raw = full(buffers, batch)
            nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(raw)), np.asarray(batch.targets)[:, :, None], 2)[:, :, 0]
            wanted[:, start + first : start + point.length] = nll[:, first:]
            final = nll[:, -5:].mean()
        assert point.nll == pytest.approx(wanted.mean(), rel=2e-6)
        assert point.final_nll == pytest.approx(final, rel=2e-6)
        assert (point.tokens, point.final_tokens, point.stride) == (3 * 64, 15, 16)
    assert curve.positions.length == 64
    assert jnp.isfinite(curve.points[0].perplexity)


def context_scorer(length: int):
    """A model whose loss is 1 / (tokens seen before), so that more context is always better."""

    def scorer(rows: np.ndarray, last: int) -> Scores:
        nll = np.broadcast_to(1.0 / np.arange(1, rows.shape[1]), (len(rows), rows.shape[1] - 1)).astype(np.float32)
        return Scores(nll[:, -last:], nll[:, -last:] < 0.5)

    return scorer


def test_lengths_are_compared_on_the_same_tokens():
    text = np.zeros((2, 129), np.int32)
    curve = perplexity(context_scorer, text, [128, 32, 64])
    assert [p.length for p in curve.points] == [32, 64, 128]
    assert [p.tokens for p in curve.points] == [256] * 3
    assert [p.final_tokens for p in curve.points] == [32] * 3
    for point in curve.points:
        losses = 1.0 / np.arange(1, point.length + 1)
        assert point.nll == pytest.approx(losses.mean(), rel=1e-6)
        assert point.final_nll == pytest.approx(losses[-16:].mean(), rel=1e-6)


def test_a_smaller_stride_gives_every_token_more_context():
    text = np.zeros((1, 129), np.int32)
    (coarse,) = perplexity(context_scorer, text, [32]).points
    (fine,) = perplexity(context_scorer, text, [32], stride=8).points
    wanted = [1 / (i + 1) if i < 32 else 1 / (24 + (i - 32) % 8 + 1) for i in range(128)]
    assert fine.nll == pytest.approx(np.mean(wanted), rel=1e-6)
    assert fine.nll < coarse.nll and fine.tokens == coarse.tokens == 128
    with pytest.raises(UserError, match="must not exceed the spans' 128 tokens"):
        perplexity(context_scorer, text, [256])


def test_loss_by_position_bins_hold_every_token_once():
    nll = np.random.default_rng(0).random((3, 100))
    found = loss_by_position(nll)
    assert found.edges[0] == 0 and found.edges[-1] == 100 and list(found.edges) == sorted(set(found.edges))
    assert sum(found.tokens) == 300
    assert sum(n * t for n, t in zip(found.nll, found.tokens, strict=True)) == pytest.approx(nll.sum())
    assert found.edges[1] == 4 and found.nll[0] == pytest.approx(nll[:, :4].mean())


def test_every_pass_has_one_shape():
    shapes = []

    def scorer(rows: np.ndarray, last: int) -> Scores:
        shapes.append(rows.shape)
        return Scores(rows[:, -last:].astype(np.float32), rows[:, -last:] > 0)

    rows = np.arange(7 * 9).reshape(7, 9)
    scores = score_rows(scorer, rows, tokens_per_forward=24, last=4)
    assert np.array_equal(scores.nll, rows[:, -4:])
    assert shapes == [(3, 9)] * 3
    score_rows(scorer, rows[:1], tokens_per_forward=1)
    assert shapes[-1] == (1, 9)


def test_bytes_per_token():
    assert bytes_per_token(np.zeros((2, 3), np.int32), Bytes()) == 1.0
