"""LongCE's weights of a prepared dataset: against one window at a time in NumPy, and on their way into the rows of a run."""

import json

import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.data.config import DataConfig, PartConfig, SourceConfig
from lcx.data.curation.dependency import LongCeSettings
from lcx.data.loader import Loader
from lcx.data.report import inspect
from lcx.data.sources import sources, token_weights
from lcx.data.sources.prepare import prepare
from lcx.data.tokenizers import tokenizers
from lcx.recipes.longce import add_weights, document_weights
from tests.model.numpy_decoder import forward
from tests.recipes.tiny_reader import reader

SETTINGS = LongCeSettings(short=8, step=4, window=32)


@pytest.fixture(scope="module")
def model():
    return reader(tokens_per_forward=128)


@pytest.fixture(scope="module")
def naive(model):
    """A document's weights, token by token."""

    def loss(context):
        return forward(model.loaded.params, context, model.loaded.run.model)[1][-1]

    def weights(tokens):
        found = np.ones(len(tokens))
        for place in range(9, len(tokens)):
            # Windows begin every 16 tokens; the first holds tokens up to 31, later ones are used for their second half.
            begun = 0 if place < 32 else (place - 16) // 16 * 16
            first = 9 if begun == 0 else 16
            near = place - (place - begun - first) % 4 - 9
            gain = loss(tokens[near : place + 1]) - loss(tokens[begun : place + 1])
            found[place] = min(np.exp(gain), 5)
        return found

    return weights


def text(size: int, seed: int) -> str:
    return "".join(map(chr, np.random.default_rng(seed).integers(97, 103, size)))


@pytest.mark.parametrize("size", [1, 9, 10, 31, 32, 33, 49, 75])
def test_weights_of_a_document(model, naive, size):
    tokens = model.tokenizer.encode(text(size, 1))
    found = document_weights(model, tokens, SETTINGS)
    np.testing.assert_allclose(found, naive(tokens), rtol=1e-4)
    assert np.all(found[:9] == 1) and (size < 20 or found[9:].std() > 0.05)


def test_most(model):
    tokens = model.tokenizer.encode(text(75, 1))
    found = document_weights(model, tokens, LongCeSettings(short=8, step=4, window=32, most=1.01))
    assert found.max() == 1.01 and found.min() < 1


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(text(50 + 7 * i, i))
    prepare(SourceConfig("text", f"{tmp_path}/*.txt"), "bytes", tmp_path / "data", shard_tokens=140)
    return tmp_path / "data"


def test_rows_have_the_weights(model, folder):
    done = []
    add_weights(folder, model, SETTINGS, done.append)
    assert done == [1, 2, 3]
    source = sources.load(SourceConfig("array_record", str(folder)), tokenizers.load("bytes"))
    assert source.weighted and source.shards == [[0, 1, 2], [3, 4], [5]]
    wanted = [document_weights(model, model.tokenizer.encode(text(50 + 7 * i, i)), SETTINGS) for i in range(6)]
    for i, own in enumerate(wanted):
        np.testing.assert_allclose(source.loss_weights(*(np.array([x]) for x in (i, 3, 40))), own[3:40], rtol=1e-3)
    both = source.loss_weights(np.array([5, 0]), np.array([80, 0]), np.array([85, 4]))
    np.testing.assert_allclose(both, np.concatenate([wanted[5][80:85], wanted[0][:4]]), rtol=1e-3)
    part = PartConfig(source=SourceConfig("array_record", str(folder)), loss_weight=2.0)
    loader = Loader(DataConfig(parts={"a": part}, heldout_fraction=0.0), 24, 2, seed=0)
    batch = loader.batch(0)
    stream = {bytes(model.tokenizer.encode(text(50 + 7 * i, i)).astype(np.uint8)): own for i, own in enumerate(wanted)}
    matched = 0
    for row, target, weight in zip(batch.tokens, batch.targets, batch.loss_weights, strict=True):
        whole = bytes(row.astype(np.uint8)) + bytes([int(target[-1])])
        for document, own in stream.items():
            if (at := document.find(whole)) >= 0:
                np.testing.assert_allclose(weight, 2 * own[at + 1 : at + 25], rtol=1e-3)
                matched += 1
    assert matched
    (found,) = inspect(loader, 8).parts
    assert found.loss_weight / found.trained != pytest.approx(2, abs=0.02)
    assert inspect(loader, 8).rows()[0][-1] == f"{found.loss_weight / found.trained:.2f}"


def test_it_resumes_and_refuses_what_does_not_fit(model, folder):
    add_weights(folder, model, SETTINGS)
    files = {path: path.read_bytes() for path in sorted((folder / "weights").iterdir())}
    meta, last = folder / token_weights.META, sorted(files)[-1]
    last.unlink()
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "complete": False}))
    with pytest.raises(UserError, match="the loss weights in .* are unfinished; rerun the same lcx data prepare"):
        sources.load(SourceConfig("array_record", str(folder)), tokenizers.load("bytes"))
    add_weights(folder, model, SETTINGS)
    assert {path: path.read_bytes() for path in sorted((folder / "weights").iterdir())} == files
    with pytest.raises(UserError, match="has loss weights of another kind"):
        add_weights(folder, model, LongCeSettings(short=8, step=2, window=32))
    with pytest.raises(UserError, match="longce.window would read 1,024 tokens at once, but model 0 was trained on 256"):
        add_weights(folder, model, LongCeSettings(short=8, step=2, window=1024))
    np.save(last, np.ones(3, np.float16))
    with pytest.raises(UserError, match=r"weights/00002.npy has \d+ bytes instead of \d+"):
        sources.load(SourceConfig("array_record", str(folder)), tokenizers.load("bytes"))
