"""Scores of documents by a tiny random model, against the same done for one document at a time without batches or padding."""

import json
import math

import numpy as np
import pytest

from lcx.cli.main import main
from lcx.core.errors import UserError
from lcx.data.config import SourceConfig
from lcx.data.curation import dependency
from lcx.data.curation.config import CuratedSource, CurationConfig
from lcx.data.curation.dependency import EntropyDropSettings, LadmSettings, LdsSettings, LongAttnSettings
from lcx.data.curation.pipeline import curate
from lcx.data.curation.scores import Learner, ScoreConfig
from lcx.data.curation.select import KeepRule
from lcx.data.sources.sources import text_hash
from lcx.interop import byte_tokenizer
from lcx.recipes import scorers
from lcx.recipes.dependency import EntropyDrop, Ladm, Lds, LongAttn
from lcx.recipes.likelihood import LikelihoodRatio, LossPerByte, LossSettings
from lcx.recipes.reader import Reader, ReaderConfig, by_length
from tests.interop import hf_models
from tests.model.numpy_decoder import forward, softmax
from tests.recipes.tiny_reader import reader


def texts() -> list[str]:
    """Of 40 to 300 bytes, with words that come again."""
    rng = np.random.default_rng(5)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 9))) for _ in range(40)]
    return [" ".join(rng.choice(words, 200))[:size] for size in (250, 40, 130, 300)]


def encoded(text: str, window: int | None = None) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)[:window]


@pytest.fixture(scope="module")
def model() -> Reader:
    return reader()


@pytest.fixture(scope="module")
def naive(model):
    """Losses of one row by the decoder in NumPy."""
    return lambda row: forward(model.loaded.params, row, model.loaded.run.model)[1]


def close(found, wanted):
    """Equal within 1e-4 of the value, or 1e-4 where it is small."""
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_rows_come_in_few_lengths():
    found = list(by_length([1, 256, 257, 1000, 512, 3], 700))
    assert found == [(256, [0, 1, 5]), (512, [2, 4]), (700, [3])]
    assert list(by_length([], 700)) == [] and [n for n, _ in by_length([65, 64], 512, 64)] == [64, 128]


def test_lds(model, naive):
    settings = LdsSettings(segment=16, window=256, pairs=24, threshold=0.01)
    scorer, wanted = Lds(model, settings), []
    for text in texts():
        tokens = encoded(text)
        count = len(tokens) // 16
        rng = np.random.default_rng((0, text_hash(text.encode())))
        chosen = sorted(rng.choice(count, min(count, 16), replace=False))
        segments = [tokens[16 * i : 16 * i + 16] for i in chosen]
        pairs = dependency.lds_pairs(len(segments), settings, rng)
        alone = [np.exp(naive(segment).mean()) for segment in segments]
        behind = [np.exp(naive(np.concatenate([segments[j], segments[i]]))[16:].mean()) for i, j in pairs]
        wanted.append(dependency.lds(np.asarray(alone), pairs, np.asarray(behind), settings))
    found = scorer(texts())
    close(found, wanted)
    assert np.round(wanted, 3).tolist()[1] == 0 and len(set(np.round(wanted, 3))) == 4
    np.testing.assert_allclose(scorer(texts()[::-1]), found[::-1], rtol=1e-5)
    assert math.isnan(scorer(["short" * 6])[0]) and scorer([]).shape == (0,)


def test_entropy_drop(model, naive):
    settings = EntropyDropSettings(short=64, step=16, window=256)
    found, wanted = EntropyDrop(model, settings)(texts()), []
    for text in texts():
        tokens = encoded(text, 256)
        first = math.floor((len(tokens) - 1) * 0.75)
        if first < 64:
            wanted.append(math.nan)
            continue
        whole, gains = naive(tokens), []
        for start in range(first, len(tokens) - 1, 16):
            end = min(start + 16, len(tokens) - 1)
            gains += list(naive(tokens[start - 64 : end + 1])[64:] - whole[start:end])
        wanted.append(np.mean(gains))
    close(found, wanted)
    assert np.isnan(found).tolist() == [False, True, False, False]


def test_ladm(model):
    settings = LadmSettings(chunk=8, stride=16, interval=16, window=256)
    found, wanted = Ladm(model, settings)(texts()), []
    for text in texts():
        tokens = encoded(text, 256)
        mass = np.zeros((2, len(tokens) // 16 + 1, 32))
        for layer, scores in enumerate(forward(model.loaded.params, tokens, model.loaded.run.model)[0]):
            for start in range(0, len(tokens) - 7, 16):
                seen = scores[:, start : start + 8].copy()
                seen[..., :8], seen[..., start:] = -np.inf, -np.inf
                weights = softmax(seen).mean(0).sum(0)
                mass[layer, start // 16] = np.pad(weights, (0, 256 - len(weights))).reshape(32, 8).sum(1)
        wanted.append(dependency.ladm(mass, len(tokens), settings))
    close(found, wanted)
    assert settings.first + 8 == 40 and math.isnan(Ladm(model, settings)(["x" * 39])[0]) and found[0] > 0.01


def test_longattn(model, tmp_path):
    settings = LongAttnSettings(window=256, distance=0.3, min_tokens=80)
    scorer, parts = LongAttn(model, settings), []
    for text in texts():
        tokens = encoded(text, 256)
        n = len(tokens)
        weights = softmax(forward(model.loaded.params, tokens, model.loaded.run.model)[0][0])
        far = np.where(np.arange(n)[:, None] - np.arange(n) >= 0.3 * n, weights, 0)
        parts.append([np.mean(far.sum((1, 2)) / n), np.mean(far.var((1, 2)))] if n >= 80 else [np.nan, np.nan])
    np.testing.assert_allclose(scorer.measure(texts()), parts, rtol=1e-4)
    (least, most), parts = (f(parts, axis=0) for f in (np.nanmin, np.nanmax)), np.asarray(parts)
    wanted = (parts[:, 0] - least[0]) / (most[0] - least[0]) - 0.5 * (parts[:, 1] - least[1]) / (most[1] - least[1])
    close(scorer(texts()), wanted)
    learned, ranges = scorer.learn(lambda: iter([(str(i), text) for i, text in enumerate(texts())]), tmp_path)
    close(learned(texts()[2:]), wanted[2:])
    assert isinstance(scorer, Learner) and ranges["strength"] == pytest.approx([least[0], most[0]], rel=1e-4)
    nothing, ranges = scorer.learn(lambda: iter([("a", "short")]), tmp_path)
    assert np.isnan(nothing(["short"])).all() and ranges == {"strength": [0.0, 0.0], "variance": [0.0, 0.0]}


def test_likelihood(model, naive):
    other, settings = reader(1), LossSettings(256)
    loss = LossPerByte(model, settings)
    given = [*texts(), "é" * 60, "x", ""]
    wanted = [naive(encoded(text, 256)).sum() / (len(encoded(text, 256)) - 1) for text in texts()]
    found = loss(given)
    close(found[:4], wanted)
    assert np.isfinite(found[4]) and np.isnan(found[5:]).all()
    ratio = LikelihoodRatio(loss, LossPerByte(other, LossSettings(100)))
    short = [forward(one.loaded.params, encoded(texts()[0], 100), one.loaded.run.model)[1].mean() for one in (other, model)]
    close(ratio(texts()[:1]), [short[0] - short[1]])
    assert ratio.fingerprint != LikelihoodRatio(loss, loss).fingerprint


def test_fingerprints_tell_scores_apart(model):
    made = [Lds(model, LdsSettings(segment=16)), Lds(model, LdsSettings(segment=32)), Lds(reader(1), LdsSettings(segment=16))]
    made.append(LossPerByte(model, LossSettings(256)))
    assert len({one.fingerprint for one in made}) == 4 and made[0].fingerprint == Lds(reader(), LdsSettings(segment=16)).fingerprint


def test_windows_that_the_model_does_not_know(model):
    with pytest.raises(UserError, match="entropy_drop.window would read 1,024 tokens at once, but model 0 was trained on 256"):
        EntropyDrop(model, EntropyDropSettings(window=1024))
    with pytest.raises(UserError, match="lds.segment times 2 would read 600 tokens at once"):
        Lds(model, LdsSettings(segment=300, window=600))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Hugging Face model over bytes."""
    made = tmp_path_factory.mktemp("model")
    hf_models.make("llama", made, vocab_size=258, num_hidden_layers=1, max_position_embeddings=256)
    byte_tokenizer.write(made, bos=True, eos=True)
    return str(made)


def test_curation_keeps_the_better_half(folder, tmp_path):
    for i, text in enumerate(texts()):
        (tmp_path / f"{i}.txt").write_text(text)
    model = {"model": folder, "tokens_per_forward": 512}
    scores = {
        "lds": ScoreConfig("lds", {**model, "segment": 8, "window": 128, "pairs": 10, "threshold": 0.001}),
        "attention": ScoreConfig("longattn", {**model, "window": 128, "min_tokens": 64}),
        "likelihood": ScoreConfig("likelihood_ratio", {**model, "other": folder, "window": 64}),
    }
    source = CuratedSource(filters=(), source=SourceConfig("text", f"{tmp_path}/*.txt"), keep={"lds": KeepRule(top_share=0.5)})
    config = CurationConfig({"a": source}, minhash=None, scores=scores)
    report = curate(config, tmp_path / "out", scorers=scorers.factories())
    kept = [json.loads(line) for line in (tmp_path / "out" / "a" / "00000.jsonl").read_text().splitlines()]
    made = Lds(Reader.load(ReaderConfig(**model)), LdsSettings(8, 128, 10, 0.001))
    values = made(texts())
    assert [row["text"] for row in kept] == [texts()[i] for i in sorted(np.argsort(-values)[:2])]
    assert kept[0]["scores"]["lds"] == pytest.approx(values[texts().index(kept[0]["text"])], rel=1e-5)
    assert all(row["scores"]["likelihood"] == 0 for row in kept) and kept[0]["scores"]["attention"] is not None
    assert report["scores"]["attention"]["strength"][0] > 0 and report["sources"]["a"]["dropped"]["select"]["documents"] == 2


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("lds", {}, "settings of kind='lds' is missing a value for model"),
        ("lds", {"model": "nowhere"}, "nowhere"),
        ("lds", {"model": "nowhere", "segments": 3}, "settings of kind='lds' has no field 'segments'; did you mean 'segment'"),
        ("ladm", {"model": "nowhere", "chunk": 100}, "ladm.stride=512 must be a multiple of ladm.chunk=100"),
        ("likelihood_ratio", {"model": "nowhere"}, "missing a value for other, the model to compare with"),
        ("loss_per_byte", {"model": "nowhere", "window": 1}, "settings.window=1 leaves no token to predict"),
        ("lds", {"model": "nowhere", "tokens_per_forward": 0}, "settings.tokens_per_forward=0 must be above 0"),
    ],
)
def test_wrong_settings(kind, settings, said):
    with pytest.raises(UserError, match=said):
        scorers.factories()[kind](ScoreConfig(kind, settings))


def test_the_command_knows_the_kinds(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "config.py").write_text(
        "from lcx.data.curation.config import curated, defaults\n\n"
        "def get_config():\n"
        "    scores = {'x': {'kind': 'entropy_drop', 'settings': {'short': 64}}}\n"
        f"    return defaults({{'scores': scores}}, a=curated('long', source={{'kind': 'text', 'path': '{tmp_path}/*.txt'}}))\n"
    )
    with pytest.raises(SystemExit):
        main(["data", "curate", f"--config={tmp_path}/config.py", f"--out={tmp_path}/out"])
    assert "settings of kind='entropy_drop' is missing a value for model" in capsys.readouterr().err.replace("\n", " ")
