"""Models wherever they come from: lcx's own checkpoints and Hugging Face folders, read alike and turned into one another."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lcx.core.configs import choice
from lcx.core.console import say, warn
from lcx.core.errors import UserError
from lcx.core.trees import cast, num_bytes, num_elements
from lcx.data.config import DataConfig
from lcx.data.tokenizers import tokenizers
from lcx.interop import byte_tokenizer
from lcx.interop import folder as hf
from lcx.interop.folder import HfFolder
from lcx.interop.hf_config import read_json, values_of
from lcx.model.architecture import build_schemes
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.training import checkpoints
from lcx.training.checkpoints import InitialWeights, Loaded, Meta, Store, scheme_configs, stage_ends
from lcx.training.stages import CheckpointConfig, RunConfig, StageConfig
from lcx.training.workdir import CONFIG, begun, fingerprint, open_workdir

DTYPES = ("float32", "bfloat16", "float16")
STAGE = "imported"
"""Name of the stage of a run that holds nothing but imported weights."""

HF_FOLDER = "hf"
"""Directory of a workdir for the files that came with the run's initial weights: an export needs them."""


def load(
    path: str | Path, step: int | None = None, stage: str | None = None, mesh: Mesh | None = None, dtype: str = "float32"
) -> Loaded:
    """The weights of a run (see `training.checkpoints.load_params`) or of a Hugging Face folder, in `dtype`, on `mesh`.

    A Hugging Face folder counts as a run with one stage, `imported`, at step 0.
    """
    choice("dtype", dtype, DTYPES)
    if step is not None and stage is not None:
        raise UserError(f"--step={step} and --stage={stage} conflict; give only one of them")
    if not hf.is_folder(path):
        loaded = checkpoints.load_params(path, step=step, stage=stage, mesh=mesh)
        return dataclasses.replace(loaded, params=cast(loaded.params, jnp.dtype(dtype)), stop_ids=stop_ids(path))
    for name, value, only in (("step", step, 0), ("stage", stage, STAGE)):
        if value is not None and value != only:
            raise UserError(f"{path} is a Hugging Face model, which has no {name} {value!r}; omit it")
    source = HfFolder(path)
    run = _run_of(source, dtype)
    return Loaded(source.params(dtype, mesh), run, _meta_of(run, source), stop_ids(path))


def initial_weights(init_from: str | None) -> InitialWeights | None:
    """The weights that a run begins with, of either kind; None without any."""
    if init_from is None:
        return None
    keep = functools.partial(copy_hf_files, init_from)
    if not hf.is_folder(init_from):
        return dataclasses.replace(checkpoints.initial_weights(init_from), keep=keep)
    source = HfFolder(init_from)
    run = _run_of(source, "float32")
    meta = _meta_of(run, source)
    return InitialWeights(init_from, meta, lambda mesh: Loaded(source.params("float32", mesh), run, meta), keep)


def stop_ids(path: str | Path) -> tuple[int, ...]:
    """Tokens at which a model's texts end, as its Hugging Face files say; none for a model of lcx's own."""
    folder = _kept(Path(path))
    for name in ("generation_config.json", "config.json"):
        file = folder / name if folder else None
        if file is not None and file.is_file():
            found = read_json(file).get("eos_token_id")
            if found is not None:
                return tuple(int(token) for token in (found if isinstance(found, list) else [found]))
    return ()


def workdir_of(path: str | Path) -> Path:
    """Where what is found out about a model is kept: in its run, and for a Hugging Face folder under runs/."""
    return Path("runs") / Path(path).resolve().name if hf.is_folder(path) else checkpoints.locate(Path(path))[0]


def short_name(path: str | Path, loaded: Loaded) -> str:
    """What tells loaded weights from others with the same `workdir_of`: their step, or where a Hugging Face folder lies."""
    if not hf.is_folder(path):
        return str(loaded.meta.step)
    return f"{STAGE}-{hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:6]}"


def copy_hf_files(init_from: str, workdir: Path) -> None:
    """Keep in a workdir what an export will need of the Hugging Face folder that its run goes back to, if there is one."""
    found = _kept(Path(init_from))
    kept = (workdir / HF_FOLDER).exists() and begun(workdir)
    if found is not None and not kept and jax.process_index() == 0:
        shutil.rmtree(workdir / HF_FOLDER, ignore_errors=True)
        hf.keep(found, workdir / HF_FOLDER)


def import_model(source: str | Path, workdir: Path, mesh: Mesh | None = None, dtype: str | None = None) -> None:
    """Write the weights of a Hugging Face folder as a run's checkpoint at step 0, in `dtype` (None: as they are stored)."""
    source = Path(source)
    if not source.is_dir():
        hint = "; fetch a model first, for example with huggingface_hub's `hf download`" if not source.exists() else ""
        raise UserError(f"{source} does not exist or is not a directory{hint}")
    given = HfFolder(source)
    dtype = _dtype(dtype, given.dtype)
    if (workdir / CONFIG).exists():
        raise UserError(f"{workdir} already holds a run; name another --workdir")
    if (workdir / checkpoints.FOLDER).exists():
        raise UserError(f"{workdir} holds checkpoints without a config.json; name another --workdir, or delete it")
    run = _run_of(given, dtype)
    _check_tokenizer(run)
    if hf.tokenizer_files(source):
        run = dataclasses.replace(run, data=DataConfig(tokenizer=str(workdir / HF_FOLDER)))
    params = given.params(dtype, mesh)
    if jax.process_count() > 1:
        # No process looks for a run in the workdir when another has begun to make one.
        multihost_utils.sync_global_devices("import")
    open_workdir(workdir, run)
    try:
        copy_hf_files(str(source), workdir)
        with Store(workdir, CheckpointConfig(), stage_ends(run)) as store:
            store.save_params(params, _meta_of(run, given))
    except BaseException:
        # A config without weights would be a run that there is not.
        (workdir / CONFIG).unlink(missing_ok=True)
        shutil.rmtree(workdir / checkpoints.FOLDER, ignore_errors=True)
        raise
    say(f"imported {num_elements(params):,} parameters as {dtype} ({num_bytes(params) / 1e9:,.2f} GB) into {workdir}")


def export_model(
    checkpoint: str | Path, out: Path, step: int | None = None, stage: str | None = None, mesh: Mesh | None = None,
    dtype: str | None = None, max_shard_bytes: int = hf.MAX_SHARD_BYTES,
) -> None:  # fmt: skip
    """Write the weights of a run as a Hugging Face folder, in `dtype` (None: that of the model it began with, else float32)."""
    base = _kept(Path(checkpoint))
    stored = values_of(base) if base else {}
    dtype = _dtype(dtype, stored.get("dtype") or stored.get("torch_dtype"))
    hf.check_new(out)
    loaded = load(checkpoint, step=step, stage=stage, mesh=mesh)
    model = loaded.run.model
    name = loaded.run.data.tokenizer
    if base is not None and not is_tokenizer_of(name, base):
        raise UserError(
            f"{checkpoint} was trained with the tokenizer {name!r}, but the model it was trained from has another one, which would "
            "be exported with the weights; train with that model's own"
        )
    tokenizer = None if base else tokenizers.load(name)
    values = hf.save(
        out, loaded.params, model, build_schemes(model, loaded.schemes), loaded.meta.length, dtype, base, max_shard_bytes,
        tokenizer and tokenizer.bos_id, tokenizer and tokenizer.eos_id,
    )  # fmt: skip
    if jax.process_index() != 0:
        return
    if tokenizer is not None:
        write_tokenizer(name, tokenizer, out)
    if not hf.tokenizer_files(out):
        warn(f"the tokenizer {name!r} was not exported; copy its files into {out}")
    say(
        f"exported {num_elements(loaded.params):,} parameters as {dtype}, {values['architectures'][0]}, into {out}: step "
        f"{loaded.meta.step} of stage {loaded.meta.stage}, for {loaded.meta.length:,} tokens"
    )


def _dtype(asked: str | None, stored: str | None) -> str:
    return choice("dtype", asked or (stored if stored in DTYPES else "float32"), DTYPES)


def _check_tokenizer(run: RunConfig) -> None:
    size = tokenizers.load(run.data.tokenizer).vocab_size
    if size > run.model.vocab_size:
        raise UserError(
            f"the tokenizer in {run.data.tokenizer} has ids up to {size - 1}, but the model's vocabulary ends at "
            f"{run.model.vocab_size - 1}; it belongs to another model, so replace it with this model's own"
        )


def _run_of(source: HfFolder, dtype: str) -> RunConfig:
    model = source.described.model
    if source.described.ignored:
        say(f"{source.folder}: keys of config.json that change nothing: {', '.join(source.described.ignored)}", stderr=True)
    execution = ExecutionConfig(compute_dtype="float32" if dtype == "float32" else "bfloat16")
    stage = StageConfig(name=STAGE, seq_len=source.described.length, steps=1, batch_size=1, monitor=False)
    data = DataConfig(tokenizer=tokenizer_of(source.folder, model))
    positions = scheme_configs(source.described.schemes)
    return RunConfig(model, (stage,), execution, positions, data, init_from=str(source.folder))


def _meta_of(run: RunConfig, source: HfFolder) -> Meta:
    return Meta(
        stage=STAGE, stage_index=0, attempt=0, stage_step=0, step=0, length=source.described.length, seed=run.seed,
        config=fingerprint(run), positions=scheme_configs(source.described.schemes),
    )  # fmt: skip


def tokenizer_of(folder: Path, model: ModelConfig) -> str:
    """What `DataConfig.tokenizer` says for the tokenizer of a folder, or for the bytes that a model without one reads."""
    if hf.tokenizer_files(folder):
        return str(folder)
    if model.vocab_size not in (256, 257, 258):
        warn(f"{folder} has no tokenizer; text is read as bytes")
    return {257: "bytes+eos", 258: "bytes+bos+eos"}.get(model.vocab_size, "bytes")


def _kept(path: Path) -> Path | None:
    """The folder with the Hugging Face files of a model: its own, or what its run kept."""
    if hf.is_folder(path):
        return path
    kept = checkpoints.locate(path)[0] / HF_FOLDER
    return kept if kept.is_dir() else None


def is_tokenizer_of(name: str, folder: Path) -> bool:
    """May `DataConfig.tokenizer` say `name` for the model in a folder? As far as files tell: one without any takes all."""
    own, given = hf.tokenizer_files(folder), Path(name).expanduser()
    if not own or name == str(folder):
        return True
    others = hf.tokenizer_files(given) if given.is_dir() else []
    return [(path.name, path.read_bytes()) for path in own] == [(path.name, path.read_bytes()) for path in others]


def write_tokenizer(name: str, tokenizer: tokenizers.Tokenizer, out: Path) -> None:
    """Copy a run's tokenizer into an exported model's directory."""
    if tokenizer.folder is None:
        byte_tokenizer.write(out, "+bos" in name, "+eos" in name)
        return
    for file in hf.files_with_weights(tokenizer.folder):
        shutil.copyfile(file, out / file.name)
