import jax
import numpy as np
import pytest

from lcx.core.batch import Batch
from lcx.core.errors import UserError
from lcx.core.param_spec import initialize
from lcx.data.sources.sources import InMemorySource, Subset
from lcx.data.tokenizers.tokenizers import Bytes
from lcx.evals.answers import AnswerLog
from lcx.evals.backends.local import LocalBackend
from lcx.evals.base import Item, Scores
from lcx.evals.comparison import compare
from lcx.evals.results import EvalResult
from lcx.evals.tasks.perplexity import Perplexity, Spans, bytes_per_token, cover, loss_by_position, spans
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
    blockwise, dense = ExecutionConfig(attention="blockwise"), ExecutionConfig(attention="dense")
    task = Perplexity(Spans(text, stride=16), final=5)
    rows = [
        row
        for n in (16, 64)
        for row in task.measure(LocalBackend(params, CONFIG, blockwise, schemes, n, 100), n, 3, AnswerLog(None))
    ]
    curve = EvalResult("test", 64, rows=tuple(rows))
    for length in (16, 64):
        arch, buffers = build_architecture(CONFIG, dense, schemes, length)
        full = jax.jit(lambda buffers, batch, arch=arch: logits(params, hidden_states(params, buffers, arch, batch)[0], CONFIG))
        wanted, final = np.zeros((3, 64)), None
        for start, first in cover(64, length, min(16, length)):
            batch = Batch.from_tokens(text[:, start : start + length + 1])
            raw = full(buffers, batch)
            nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(raw)), np.asarray(batch.targets)[:, :, None], 2)[:, :, 0]
            wanted[:, start + first : start + length] = nll[:, first:]
            final = nll[:, -5:].mean()
        assert curve.value(metric="nll", length=length) == pytest.approx(wanted.mean(), rel=2e-6)
        assert curve.value(metric="final_nll", length=length) == pytest.approx(final, rel=2e-6)
        assert [row.n for row in curve.select(length=length).rows][:2] == [3 * 64, 15]
    assert curve.select(metric="nll_by_position").values("length") == [64]


class ContextBackend:
    """A model whose loss is 1 / (tokens seen before), so that more context is always better."""

    fingerprint = "context"

    def loglikelihood(self, items):
        losses = [1.0 / np.arange(len(item.prompt), len(item.prompt) + len(item.answer)) for item in items]
        return [Scores(nll.astype(np.float32), nll < 0.5) for nll in losses]


def curve_of(text, lengths, final, stride=None) -> EvalResult:
    task = Perplexity(Spans(text, stride), final)
    rows = [row for length in lengths for row in task.measure(ContextBackend(), length, len(text), AnswerLog(None))]
    return EvalResult("test", 0, rows=tuple(rows))


def test_lengths_are_compared_on_the_same_tokens():
    curve = curve_of(np.zeros((2, 129), np.int32), (32, 64, 128), final=16)
    assert [row.n for row in curve.select(metric="nll").rows] == [256] * 3
    assert [row.n for row in curve.select(metric="final_nll").rows] == [32] * 3
    for length in (32, 64, 128):
        losses = 1.0 / np.arange(1, length + 1)
        assert curve.value(metric="nll", length=length) == pytest.approx(losses.mean(), rel=1e-6)
        assert curve.value(metric="final_nll", length=length) == pytest.approx(losses[-16:].mean(), rel=1e-6)


def test_a_smaller_stride_gives_every_token_more_context():
    text = np.zeros((1, 129), np.int32)
    coarse, fine = (curve_of(text, (32,), 16, stride).select(metric="nll") for stride in (None, 8))
    wanted = [1 / (i + 1) if i < 32 else 1 / (24 + (i - 32) % 8 + 1) for i in range(128)]
    assert fine.mean() == pytest.approx(np.mean(wanted), rel=1e-6)
    assert fine.mean() < coarse.mean() and fine.rows[0].n == coarse.rows[0].n == 128
    with pytest.raises(UserError, match="must not exceed the spans' 128 tokens"):
        curve_of(text, (256,), 16)


def test_losses_are_paired_only_where_windows_and_last_tokens_are_the_same():
    text = np.zeros((2, 129), np.int32)

    def paired(**other):
        before, after = (curve_of(text, (32, 128), **{"final": 16, **changed}) for changed in ({}, other))
        return [(row.metric, row.length) for row in compare(before, after)]

    all_of_them = [(metric, length) for length in (32, 128) for metric in ("nll", "final_nll")]
    assert paired() == paired(stride=64) == all_of_them
    # The longest length has one window, and the last tokens are those of the last one, whatever the stride.
    assert paired(stride=8) == all_of_them[1:]
    assert paired(final=8) == [("nll", 32), ("nll", 128)]


def test_loss_by_position_bins_hold_every_token_once():
    nll = np.random.default_rng(0).random((3, 100))
    found = loss_by_position(nll)
    edges = [row.positions[0] for row in found] + [found[-1].positions[1]]
    assert edges[0] == 0 and edges[-1] == 100 and edges == sorted(set(edges))
    assert [row.positions[1] for row in found] == edges[1:]
    assert sum(row.n for row in found) == 300
    assert sum(row.value * row.n for row in found) == pytest.approx(nll.sum())
    assert edges[1] == 4 and found[0].value == pytest.approx(nll[:, :4].mean())


def test_every_pass_has_one_shape(monkeypatch):
    schemes = build_schemes(CONFIG, {"default": "rope:theta=100"})
    backend, shapes = LocalBackend({}, CONFIG, ExecutionConfig(), schemes, 8, tokens_per_forward=24), []

    def score(rows, first, count):
        shapes.append((rows.shape, count))
        chosen = np.stack([row[1 + start :][:count] for row, start in zip(rows, first, strict=True)])
        return chosen.astype(np.float32), chosen > 0

    monkeypatch.setattr(backend, "_score", score)
    rows = np.arange(7 * 9).reshape(7, 9)
    found = backend.loglikelihood([Item(row[:5], row[5:]) for row in rows])
    assert np.array_equal(np.stack([score.nll for score in found]), rows[:, 5:])
    short = backend.loglikelihood([Item(rows[1, :2], rows[1, 2:4])])
    assert np.array_equal(short[0].nll, rows[1, 2:4])
    assert shapes == [((3, 9), 8)] * 4


def test_bytes_per_token():
    assert bytes_per_token(np.zeros((2, 3), np.int32), Bytes()) == 1.0
