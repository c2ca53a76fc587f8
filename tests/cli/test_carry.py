"""`lcx extract` and `lcx apply`: from two models to a third, and what is typed wrongly."""

import json

import numpy as np
import pytest

from lcx.cli.main import main
from tests.merging.folders import NORM, Q, load, make


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base, a fine-tune for longer rows and a sibling."""
    folder = tmp_path_factory.mktemp("carry")
    make(folder / "base")
    make(folder / "tuned", seed=1, near=folder / "base", rope_theta=50000.0, max_position_embeddings=256)
    make(folder / "sibling", seed=2, near=folder / "base")
    (folder / "model.gguf").write_bytes(b"GGUF")
    return folder


def test_from_two_models_to_a_third(root, tmp_path, capsys):
    names = [str(root / name) for name in ("base", "tuned", "sibling")]
    main(["extract", *names[:2], f"--out={tmp_path / 'delta'}", "--full"])
    main(["apply", str(tmp_path / "delta"), names[2], f"--out={tmp_path / 'out'}", "--weight=0.5"])
    base, tuned, sibling = (load(root / name) for name in ("base", "tuned", "sibling"))
    for name, x in load(tmp_path / "out").items():
        np.testing.assert_allclose(x, sibling[name] + 0.5 * (tuned[name] - base[name]), atol=1e-6)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["rope_theta"], values["max_position_embeddings"]) == (50000.0, 256)
    said = " ".join(capsys.readouterr().out.split())
    assert f"see {tmp_path / 'out'}" in said
    main(["extract", *names[:2], f"--out={tmp_path / 'adapter'}", "--rank=2"])
    said = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj" in said and "energy" in said
    stored = load(tmp_path / "adapter")
    assert stored[f"base_model.model.{Q.format(0).removesuffix('.weight')}.lora_A.weight"].shape == (2, 16)
    assert f"base_model.model.{NORM}" in stored


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["extract", "BASE"], "takes a base and its fine-tune but got 1 model; use lcx extract BASE TUNED --out=DIR"),
        (["extract", "BASE", "TUNED"], "--out is missing"),
        (
            ["extract", "BASE", "TUNED", "--out=OUT"],
            "give one of --rank=R, --energy=SHARE, --full and --sparse=SHARE; none was",
        ),
        (["extract", "BASE", "TUNED", "--out=OUT", "--rank=2", "--full"], "=SHARE; --rank and --full were"),
        (["extract", "BASE", "TUNED", "--out=OUT", "--rank=0"], "--rank=0 must be at least 1"),
        (["extract", "BASE", "TUNED", "--out=OUT", "--energy=1.5"], "--energy=1.5 must be a share above 0 and at most 1"),
        (["extract", "BASE", "TUNED", "--out=OUT", "--sparse=0"], "--sparse=0.0 must be a share of the numbers above 0"),
        (["extract", "BASE", "TUNED", "--out=OUT", "--full", "--embed"], "--embed is for adapters; --full has all tensors"),
        (["extract", "BASE", "BASE", "--out=OUT", "--rank=2"], "there is nothing to extract"),
        (["extract", "BASE", "gone", "--out=OUT", "--rank=2"], "gone does not exist or is not a directory; fetch a model first"),
        (["extract", "BASE", "MODEL.gguf", "--out=OUT", "--rank=2"], "model.gguf is a GGUF file, but lcx merge, extract and apply"),
        (["extract", "BASE", "TUNED", "--out=BASE", "--full"], "already exists; choose a new folder"),
        (["apply", "BASE"], "takes a delta and a model but got 1 name; use lcx apply DELTA TARGET --out=DIR"),
        (
            ["apply", "BASE", "TUNED", "--out=OUT"],
            "holds neither lcx_delta.json nor adapter_config.json; name what lcx extract wrote",
        ),
        (["apply", "gone", "TUNED", "--out=OUT"], "gone does not exist; name the folder that lcx extract wrote"),
    ],
    ids=str,
)
def test_what_is_typed_wrongly(root, tmp_path, capsys, words, said):
    places = {"BASE": str(root / "base"), "TUNED": str(root / "tuned"), "MODEL": str(root / "model"), "OUT": str(tmp_path / "out")}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    with pytest.raises(SystemExit) as left:
        main(words)
    err = " ".join(capsys.readouterr().err.split())
    assert left.value.code == 1 and said in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())
