"""Whatever is damaged of checkpoints, prepared data and exports is found before it is used, and `lcx verify` names it."""

import dataclasses
import random
import shutil

import jax
import numpy as np
import pytest

from lcx.cli.main import main
from lcx.core.configs import build
from lcx.core.errors import UserError
from lcx.data.config import SourceConfig
from lcx.data.sources import prepared, sources
from lcx.data.sources.prepare import prepare
from lcx.data.tokenizers import tokenizers
from lcx.recipes import models
from lcx.recipes.verify import verify
from lcx.training.checkpoints import PROGRESS, Store
from lcx.training.loading import load_params
from lcx.training.meta import Meta, scheme_configs
from lcx.training.stages import RunConfig
from lcx.training.step import TrainState
from lcx.training.workdir import open_workdir
from tests.damage import KINDS, damage, files, fresh

SIZES = {"vocab_size": 256, "model_dim": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4, "mlp_dim": 16}
STAGE = {"name": "only", "seq_len": 32, "steps": 8, "batch_size": 1, "monitor": False}


def run_and_meta(step):
    run = build(RunConfig, {"model": SIZES, "stages": [STAGE], "positions": {"default": {"name": "rope", "theta": 100.0}}})
    meta = Meta("only", 0, 0, step, step, 32, 0, "", {"default": {"name": "rope", "theta": 100.0}})
    return run, dataclasses.replace(meta, positions=scheme_configs(meta.schemes))


def state(step):
    run, meta = run_and_meta(step)
    params = jax.tree.map(
        lambda spec: jax.random.normal(jax.random.key(step), spec.shape),
        run.specs(meta.schemes, 32),
        is_leaf=lambda x: hasattr(x, "logical_axes"),
    )
    return TrainState(params, {}, {"mu": jax.tree.map(np.negative, params)}, *(jax.numpy.int32(step) for _ in range(3)))


def abstract(_):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two checkpoints."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    open_workdir(workdir, run_and_meta(0)[0])
    with Store(workdir, run_and_meta(0)[0].checkpoint) as store:
        for step in (4, 8):
            store.save(state(step), run_and_meta(step)[1])
    return workdir


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A prepared dataset of three shards."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(6):
        (folder / f"{i}.txt").write_bytes(np.random.default_rng(i).integers(97, 123, 5000, np.uint8).tobytes())
    prepare(SourceConfig("text", str(folder / "*.txt")), "bytes", folder / "set", shard_tokens=10_000)
    return folder / "set"


@pytest.fixture(scope="module")
def export(run, tmp_path_factory):
    """A Hugging Face folder in two shards."""
    out = tmp_path_factory.mktemp("export") / "out"
    models.export_model(run, out, max_shard_bytes=20_000)
    return out


def resumed(workdir):
    with Store(workdir, run_and_meta(0)[0].checkpoint) as store:
        found, meta = store.restore(abstract, lambda _: True)
    return meta.step, found


def check_checkpoint(run, into, kind, rng, capfd):
    """The newest is set aside, the one before read whole; readers of weights refuse what is wrong with weights."""
    workdir = fresh(run, into)
    what = damage(workdir / "checkpoints/8", kind, rng)
    if PROGRESS not in what.partition(" swapped")[0].partition("/")[0] or "swapped" in what and "params" in what:
        with pytest.raises(UserError, match="checkpoint 8 in .* is damaged"):
            load_params(workdir)
    assert not verify(workdir), what
    step, found = resumed(workdir)
    assert step == 4 and (workdir / "checkpoints.unreadable/8").is_dir(), what
    jax.tree.map(np.testing.assert_array_equal, found, state(4))
    said = " ".join(capfd.readouterr().err.split())
    assert "checkpoint 8 in" in said and "resuming from step 4" in said, (what, said)
    return what


def check_dataset(dataset, into, kind, rng):
    folder = fresh(dataset, into)
    what = damage(folder, kind, rng)
    with pytest.raises(UserError):
        sources.load(SourceConfig("array_record", str(folder)), tokenizers.load("bytes"))
    assert not verify(folder), what
    return what


def check_export(export, into, kind, rng):
    folder = fresh(export, into)
    # Without its manifest a folder is one of any other program's.
    what = damage(folder, kind, rng, spared=("checksums.json",) if kind == "missing" else ())
    with pytest.raises(UserError):
        models.load(folder)
    assert not verify(folder), what
    return what


def many(run, dataset, export, tmp_path, capfd, counts):
    """Seeded damages, `counts` of checkpoints, datasets and exports; returns what was done, all of it found."""
    done = []
    for number in range(max(counts)):
        kinds, rng = [KINDS[(number + i) % len(KINDS)] for i in range(3)], random.Random(number)
        if number < counts[0]:
            done.append(check_checkpoint(run, tmp_path / "run", kinds[0], rng, capfd))
        if number < counts[1]:
            done.append(check_dataset(dataset, tmp_path / "set", kinds[1], rng))
        if number < counts[2]:
            done.append(check_export(export, tmp_path / "out", kinds[2], rng))
    return done


def test_damage_of_every_kind_is_found(run, dataset, export, tmp_path, capfd):
    assert len(many(run, dataset, export, tmp_path, capfd, (4, 4, 4))) == 12


@pytest.mark.slow
def test_two_hundred_damages_are_found(run, dataset, export, tmp_path, capfd):
    done = many(run, dataset, export, tmp_path, capfd, (80, 60, 60))
    assert len(done) == 200 and len(set(done)) > 120


def test_what_is_whole_is_read_and_said_to_be(run, dataset, export, tmp_path, capsys):
    for folder in (run, dataset, export, run / "checkpoints", run / "checkpoints/8"):
        main(["verify", str(folder)])
        said = capsys.readouterr().out
        assert "all whole" in said and "bytes compared" in said and "damaged" not in said, said
    assert resumed(run)[0] == 8
    assert load_params(run).meta.step == 8 and models.load(export).run.model.model_dim == 8
    assert not (run / "checkpoints.unreadable").exists()


def test_verify_names_the_array_and_exits_with_1(run, tmp_path, capsys):
    workdir = fresh(run, tmp_path / "run")
    (file,) = [path for path in files(workdir / "checkpoints/8/params") if path.parent.name == "d" and "process" in str(path)]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(bytes(content))
    with pytest.raises(SystemExit) as caught:
        main(["verify", str(workdir)])
    said = capsys.readouterr().out
    assert caught.value.code == 1 and "1 of 3 damaged" in said
    table, below = said.split("└")
    assert "damaged" in table and max(map(len, table.splitlines())) < 100
    assert "\ncheckpoints/8: array params/" in below
    with pytest.raises(UserError, match=r"array params/\S+ is not what was saved.* name another of its steps \(4\)"):
        load_params(workdir)
    assert load_params(workdir, step=4).meta.step == 4


def test_a_file_changed_on_purpose_is_accepted_with_update(export, tmp_path, capsys):
    folder = fresh(export, tmp_path / "out")
    (folder / "README.md").write_text("mine")
    models.load(folder)  # a card is for people
    config = folder / "config.json"
    config.write_text(config.read_text().replace("100.0", "200.0"))
    with pytest.raises(UserError, match=r"config.json has other contents than were written; .* lcx verify \S+ --update"):
        models.load(folder)
    main(["verify", str(folder), "--update"])
    (scheme,) = models.load(folder).schemes.values()
    assert scheme.theta == 200.0


@pytest.mark.parametrize(
    ("place", "says"), [(5000, r"document '\S+' in \S+ is not what was written"), (65560, "a shard of the dataset")]
)
def test_a_large_dataset_is_checked_document_by_document(place, says, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "WHOLE", 1000)
    folder = fresh(dataset, tmp_path / "set")
    shard = folder / "lcx-train.array_record-00001"
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(UserError, match=says):
        source = sources.load(SourceConfig("array_record", str(folder)), tokenizers.load("bytes"))
        assert len(source.gather(np.array([0]), np.array([0]), np.array([5000]))) == 5000
        for document in range(2, 4):
            source.gather(np.array([document]), np.array([0]), np.array([5000]))


def test_a_run_whose_config_was_changed_is_refused(run, tmp_path):
    workdir = fresh(run, tmp_path / "run")
    config = workdir / "config.json"
    config.write_text(config.read_text().replace('"norm_eps": 1e-05', '"norm_eps": 3e-05').replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match="config.json is damaged"):
        load_params(workdir)
    assert not verify(workdir)


def test_nothing_to_check_is_an_error(run, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="nothing could be checked"):
        verify(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        verify(tmp_path / "none")
    shutil.copytree(run / "checkpoints/8", tmp_path / "checkpoints/9")
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(UserError, match="checkpoint 9 in .* is damaged: its metadata"):
        load_params(tmp_path)
