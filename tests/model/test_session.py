"""Answers of one row whose cache stays are those of the whole row read anew, whatever was said or taken back before."""

import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.model import session
from lcx.model.config import ModelConfig
from lcx.model.decode import generate
from lcx.model.sampling import Sampling
from lcx.model.session import Session
from tests.model.test_transformer import build

CONFIG = ModelConfig(
    model_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, pattern=("local", "global"), window=6
)
LENGTH, NEW = 160, 11
RNG = np.random.default_rng(0)
ROW = RNG.integers(0, 256, LENGTH).astype(np.int32)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Chunks and a cache so small that every case wraps around, pads and grows."""
    for name, value in {"CHUNK": 16, "SMALL_CHUNK": 4, "FEWEST_SLOTS": 96}.items():
        monkeypatch.setattr(session, name, value)


def made(scheme="rope:theta=500"):
    params, buffers, arch = build(CONFIG, {"default": scheme}, length=LENGTH)
    params["embed"]["embedding"] = params["embed"]["embedding"] * 4
    return params, buffers, arch


def anew(model, tokens, sampling, new=NEW):
    """One program for all lengths, the session's own with all its slots."""
    return generate(*model, [tokens], new, sampling=sampling, chunk=16, slots=164)[0]


@pytest.mark.parametrize(
    "scheme", ["rope:theta=500", pytest.param("self_extend:theta=500,window=4,group=2", marks=pytest.mark.slow)]
)
def test_a_row_goes_on_goes_back_and_grows(scheme):
    model, sampling = made(scheme), Sampling(1.0, seed=3)
    talk = Session(*model, LENGTH)
    row = ROW[:9]
    for further in (3, 40, 1, 17):
        new = talk.answer(row, NEW, sampling=sampling)
        np.testing.assert_array_equal(new, anew(model, row, sampling))
        np.testing.assert_array_equal(talk.tokens, np.concatenate([row, new[:-1]]))
        row = np.concatenate([row, new, ROW[:further]])
    # Back a little, where the window's ring still has what is seen; back far, where it has not; and to a row with another start.
    for other in (row[:100], np.concatenate([row[:90], ROW[:5]]), row[:30], np.concatenate([ROW[50:70], row[:60]]), row[:1]):
        np.testing.assert_array_equal(talk.answer(other, NEW, sampling=sampling), anew(model, other, sampling))


def test_what_was_read_is_not_read_again():
    read = []
    talk = Session(*made(), LENGTH)
    talk.answer(ROW[:50], 3, on_read=lambda done, total: read.append((done, total)))
    assert read == [(0, 50), (16, 50), (32, 50), (48, 50), (50, 50)]
    read.clear()
    talk.answer(np.concatenate([ROW[:50], ROW[:4]]), 3, on_read=lambda done, total: read.append((done, total)))
    assert read[0] == (50, 54) and read[-1] == (54, 54)
    read.clear()
    # The same row again: its last token has to be read for the first new one.
    talk.answer(ROW[:50], 3, on_read=lambda done, total: read.append((done, total)))
    assert read == [(49, 50), (50, 50)]


def test_ends_and_interruptions():
    model = made()
    whole = anew(model, ROW[:20], Sampling(1.0, seed=1))
    talk = Session(*model, LENGTH)

    def answer(**options):
        return talk.answer(ROW[:20], NEW, sampling=Sampling(1.0, seed=1), **options)

    np.testing.assert_array_equal(answer(stop_ids=[int(whole[4])]), whole[: list(whole).index(whole[4]) + 1])
    heard = []
    np.testing.assert_array_equal(answer(on_token=lambda token: heard.append(token) or len(heard) == 3), whole[:3])
    assert heard == whole[:3].tolist()
    # Asked between chunks and blocks: nothing of the answer yet, or its first token and no block.
    assert len(answer(is_stopped=lambda: True)) == 0
    asked = iter([False, True])
    np.testing.assert_array_equal(answer(is_stopped=lambda: next(asked)), whole[:1])
    np.testing.assert_array_equal(answer(), whole)


def test_an_interrupted_step_leaves_a_session_that_reads_anew(monkeypatch):
    model = made()
    talk = Session(*model, LENGTH)
    talk.answer(ROW[:30], NEW)

    def broken(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session, "extend", broken)
        with pytest.raises(KeyboardInterrupt):
            talk.answer(ROW[:40], NEW)
    np.testing.assert_array_equal(talk.answer(ROW[:40], NEW), anew(model, ROW[:40], Sampling()))


def test_sizes_that_do_not_fit():
    talk = Session(*made(), LENGTH)
    with pytest.raises(UserError, match="150 tokens and 11 new ones must fit into 160"):
        talk.answer(ROW[:150], NEW)
    with pytest.raises(UserError, match="at least one token"):
        talk.answer(ROW[:0], NEW)
    assert len(talk.answer(ROW[:149], NEW)) == NEW
