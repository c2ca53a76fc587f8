"""Embedders against sums by hand, and which one is taken."""

import collections
import importlib.util
import json
import math

import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.data.curation import embed, words
from lcx.data.curation.embed import EmbedConfig, Hashed, build_embedder, fitted, normalised, pieces

TEXT = "the old house by the river, and the river by the old mill\n"


def hashed_by_hand(text, corpus, dim):
    """TF-IDF with one dictionary entry a bucket, in float64."""

    def buckets(one):
        hashes = words.split(one).hashes
        pairs = [hashes[i : i + 2] for i in range(len(hashes) - 1)]
        keys = [*hashes, *(words.ngrams(pair, 2)[0] for pair in pairs)]
        return collections.Counter(int(words.mix(np.array([key], np.uint64))[0]) % Hashed.BUCKETS for key in keys)

    df = collections.Counter(bucket for one in corpus for bucket in buckets(one))
    signs = np.random.Generator(np.random.PCG64(907)).integers(0, 2, (Hashed.BUCKETS, dim), np.int8) * 2.0 - 1
    found = np.zeros(dim)
    for bucket, count in buckets(text).items():
        idf = math.log((1 + len(corpus)) / (1 + df[bucket])) + 1 if corpus else 1
        found += (1 + math.log(count)) * idf * signs[bucket]
    return found / np.linalg.norm(found)


@pytest.mark.parametrize("corpus", [(), (TEXT, "the mill is old", "a river of the north")])
def test_hashed_vectors_are_those_of_the_formula(corpus):
    embedder = Hashed(32)
    embedder = fitted(embedder, corpus) if corpus else embedder
    found = embedder([TEXT, "", "the mill"])
    assert found.shape == (3, 32) and found.dtype == np.float32
    for row, text in ((0, TEXT), (2, "the mill")):
        assert np.allclose(found[row], hashed_by_hand(text, corpus, 32), atol=1e-6)
    assert not found[1].any()


def test_projection_keeps_cosines():
    """Documents that share a share of their words: the cosine of their vectors is that of their TF-IDF, to a few over √dim."""
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"w{i}" for i in range(5000)])
    base = rng.choice(vocabulary, 400, replace=False)
    texts = [" ".join([*base[:shared], *rng.choice(vocabulary, 400 - shared)]) for shared in (400, 300, 200, 100, 0)]
    embedder = Hashed(256)
    weights = np.array([np.where(c := embedder.counts(text), 1 + np.log(np.maximum(c, 1)), 0) for text in texts])
    exact = normalised(weights) @ normalised(weights).T
    found = embedder(texts)
    assert np.abs(found @ found.T - exact).max() < 4 / math.sqrt(256)
    assert (np.diff((found @ found.T)[0]) < 0).all()


def test_pairs_reach_over_the_pieces_of_a_long_text(monkeypatch):
    text = TEXT * 40
    whole = Hashed(16).counts(text)
    monkeypatch.setattr(embed, "pieces", lambda text, most: pieces(text, 100))
    assert (Hashed(16).counts(text) == whole).all()
    assert whole.sum() == 13 * 40 + 13 * 40 - 1


@pytest.mark.parametrize("most", [7, 30, 1000])
def test_pieces_are_the_text(most):
    text = "a bb ccc dddd\neeeee ffffff" * 5 + "x" * 40
    found = list(pieces(text, most))
    assert "".join(found) == text and max(map(len, found)) <= most and list(pieces("", 5)) == []


VOCABULARY = ["[UNK]", "the", "old", "house", "river"]


def static_folder(folder, **tensors):
    """A model2vec folder with words as tokens."""
    pytest.importorskip("tokenizers", reason="the extra data")
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(3)
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def test_a_static_folder_is_the_mean_over_all_tokens(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    table = rng.standard_normal((5, 8)).astype(np.float32)
    embedder = build_embedder(EmbedConfig(path=static_folder(tmp_path / "model", embeddings=table)))
    assert embedder.kind == "static"
    # Unknown words count for nothing, and no truncation of the tokenizer holds.
    mean = (2 * table[1] + table[2] + table[3] + 3 * table[4]).astype(np.float64) / 7
    texts = ["the old castle the house river river river", "", "castle"]
    monkeypatch.setattr(embed, "PIECE_CHARS", 9)
    monkeypatch.setattr(embed, "PIECES", 2)
    found = embedder(texts)
    assert np.allclose(found[0], mean / np.linalg.norm(mean), atol=1e-6) and not found[1:].any()
    weights, mapping = np.array([1, 0.5, 2, 1, 1], np.float64), np.array([0, 2, 1, 3, 4])
    other = build_embedder(
        EmbedConfig(
            "static",
            static_folder(tmp_path / "other", embeddings=table[:, :4].astype(np.float16), weights=weights, mapping=mapping),
        )
    )
    half = table[:, :4].astype(np.float16).astype(np.float64)
    mean = 0.5 * half[2] + 2 * half[1]
    assert np.allclose(other(["the old"])[0], mean / np.linalg.norm(mean), atol=1e-6)
    assert other.fingerprint != embedder.fingerprint


def test_wrong_static_folders(tmp_path):
    with pytest.raises(UserError, match="no-model/model.safetensors cannot be read; name a folder with"):
        build_embedder(EmbedConfig("static", str(tmp_path / "no-model")))
    with pytest.raises(UserError, match="has no tensor 'embeddings' or 'embedding.weight'"):
        build_embedder(EmbedConfig("static", static_folder(tmp_path / "a", vectors=np.zeros((5, 2), np.float32))))
    with pytest.raises(UserError, match="5 tokens have 3 vectors"):
        build_embedder(EmbedConfig("static", static_folder(tmp_path / "b", embeddings=np.zeros((3, 2), np.float32))))
    folder = static_folder(tmp_path / "c", embeddings=np.zeros((5, 2), np.float32))
    (tmp_path / "c" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="model.safetensors and tokenizer.json cannot be read"):
        build_embedder(EmbedConfig("static", folder))


def test_wordllama_without_its_package():
    if importlib.util.find_spec("wordllama") is None:
        pytest.skip("wordllama is not installed")
    embedder = build_embedder(EmbedConfig())
    assert embedder.kind == "wordllama"
    found = embedder(["The cat sat on the mat.", "A kitten lay on the rug.", "Quarterly revenue rose by four percent."])
    cosines = found @ found.T
    assert cosines[0, 1] > cosines[0, 2] + 0.1 and cosines[0, 1] > cosines[1, 2] + 0.1
    long = TEXT * 300
    assert float(embedder([long])[0] @ embedder([TEXT])[0]) > 0.99


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_vectors_of_a_file_go_by_name(tmp_path, kind):
    vectors = np.array([[3, 4], [0, 2]], np.float64)
    path = tmp_path / f"v.{kind}"
    if kind == "npz":
        np.savez(path, names=np.array(["b", "a"]), vectors=vectors)
    else:
        np.save(path, vectors)
        (tmp_path / "v.txt").write_text("b\na\n")
    embedder = build_embedder(EmbedConfig(path=str(path)))
    found = embedder(["x", "y", "z"], ["a", "c", "b"])
    assert found[0].tolist() == [0, 1] and np.isnan(found[1]).all() and np.allclose(found[2], [0.6, 0.8])
    with pytest.raises(UserError, match="belong to names of documents"):
        embedder(["x"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"names": np.array(["a"]), "vectors": np.zeros((2, 3))}, "has 1 names for float64"),
        ({"names": np.array(["a", "a"]), "vectors": np.zeros((2, 3))}, "has names twice"),
        ({"vectors": np.zeros((2, 3))}, "cannot be read .*names"),
    ],
)
def test_wrong_vectors(tmp_path, arrays, message):
    np.savez(tmp_path / "v.npz", **arrays)
    with pytest.raises(UserError, match=message):
        build_embedder(EmbedConfig(path=str(tmp_path / "v.npz")))


def test_the_ladder(monkeypatch, tmp_path):
    class Model:
        kind, fingerprint = "hidden", "model"

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert build_embedder(EmbedConfig()).kind == "hashed"
    assert build_embedder(EmbedConfig(model="run"), {"hidden": lambda config: Model()}).kind == "hidden"
    with pytest.raises(UserError, match="embedding.model='run' needs a caller that runs models"):
        build_embedder(EmbedConfig(model="run"))
    with pytest.raises(UserError, match="dim=64 is that of hashed vectors, but these are hidden"):
        build_embedder(EmbedConfig(model="run", dim=64), {"hidden": lambda config: Model()})
    with pytest.raises(UserError, match="'wordllama' needs the package; pip install wordllama, or use 'hashed'"):
        build_embedder(EmbedConfig("wordllama"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "hash"}, "did you mean 'hashed'"),
        ({"kind": "hashed", "path": "x.npz"}, "path='x.npz' is not used by embedding.kind='hashed'; leave it out"),
        ({"kind": "static"}, "'static' needs embedding.path; name it"),
        ({"kind": "hidden"}, "'hidden' needs embedding.model; name it"),
        ({"dim": 0}, "embedding.dim=0 must be above 0"),
        ({"kind": "wordllama", "dim": 64}, "dim=64 is not used by embedding.kind='wordllama'"),
        ({"path": "x.npz", "model": "run"}, "are two kinds of vectors; leave one out"),
    ],
)
def test_wrong_configs(values, message):
    with pytest.raises(UserError, match=message):
        EmbedConfig(**values)


def test_the_config_can_be_kept_as_json():
    assert json.loads(json.dumps(EmbedConfig().__dict__)) == {"kind": "auto", "path": "", "model": "", "dim": None}
