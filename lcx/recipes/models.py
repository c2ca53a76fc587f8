"""Models wherever they come from: lcx's own checkpoints, Hugging Face folders, GGUF files; read alike, turned into one another."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lcx.core import manifest, processes
from lcx.core.configs import choice
from lcx.core.console import say, warn
from lcx.core.errors import UserError
from lcx.core.files import sampled_hash
from lcx.core.gguf import is_gguf, stem
from lcx.core.mesh import MeshConfig, fast_dtype, make_mesh
from lcx.core.numbers import size
from lcx.core.quantized import Hold
from lcx.core.trees import Tree, cast, num_bytes, num_elements, paths
from lcx.data.config import DataConfig
from lcx.data.tokenizers import tokenizers
from lcx.interop import byte_tokenizer, gguf, peft, peft_save
from lcx.interop import folder as hf
from lcx.interop.folder import HfFolder
from lcx.interop.gguf import GgufModel
from lcx.interop.hf_config import Described, read_file, read_json, values_of
from lcx.interop.peft import PeftFolder
from lcx.model.architecture import build_schemes
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.recipes.cards import Adapter, check_hub_name, write_card
from lcx.training import loading
from lcx.training.checkpoints import FOLDER, Store
from lcx.training.loading import InitialWeights, Loaded
from lcx.training.meta import Meta, scheme_configs
from lcx.training.stages import CheckpointConfig, RunConfig, StageConfig, stage_ends
from lcx.training.workdir import CONFIG, begun, fingerprint, open_workdir

DTYPES = ("float32", "bfloat16", "float16")
AUTO = "auto"
"""In place of one of them: for weights that are not lcx's own `core.mesh.fast_dtype`, for others float32."""
GGUF_DTYPES = tuple(gguf.TYPES)
"""What a GGUF file can be written in."""
FORMATS = ("hf", "gguf", "peft")
STAGE = "imported"
"""Name of the stage of a run that holds nothing but imported weights."""

SLOW = 1 << 26
"""Bytes of a model from which on it is said that it is read."""

HF_FOLDER = "hf"
"""Directory of a workdir for the files that came with the run's initial weights: an export needs them."""


Source = HfFolder | GgufModel | PeftFolder


def is_foreign(path: str | Path) -> bool:
    """Whether a path means a model that is not lcx's own: a Hugging Face folder, an adapter of peft's, or a GGUF file."""
    return is_gguf(path) or hf.is_folder(path) or peft.is_adapter(path)


def opened(path: str | Path) -> Source:
    """A Hugging Face folder, an adapter of peft's with its base, or a GGUF file; raises `UserError` for what lcx would not compute
    exactly."""
    return GgufModel(path) if is_gguf(path) else PeftFolder(path) if peft.is_adapter(path) else HfFolder(path)


def _read(source: Source, path: str | Path, dtype: str, mesh: Mesh | None, hold: Hold | None = None) -> Tree:
    """The weights of a model, of which is said that it is read if that takes a while."""
    if (total := sum(file.stat().st_size for file in source.files)) >= SLOW:
        say(f"reading {path}, {size(total)}", stderr=True)
    return source.params(dtype, mesh, hold)


def described(path: Path) -> Described:
    """What a Hugging Face folder, an adapter or a GGUF file says about its model, without a look at its weights."""
    return gguf.describe(path) if is_gguf(path) else opened(path).described if peft.is_adapter(path) else read_file(path)


def load(
    path: str | Path, step: int | None = None, stage: str | None = None, mesh: Mesh | None = None, dtype: str = "float32"
) -> Loaded:
    """The weights of a run (see `training.loading.load_params`) or of a model that is not lcx's own, in `dtype`, on `mesh`.

    The latter counts as a run with one stage, `imported`, at step 0, and computed in bfloat16 unless `dtype` is float32. A run is
    computed in the type that it was trained in. `dtype` may be `AUTO`.
    """
    choice("dtype", dtype, (AUTO, *DTYPES))
    if dtype == AUTO:
        dtype = fast_dtype(one_by_one=True) if is_foreign(path) else "float32"
    if step is not None and stage is not None:
        raise UserError(f"--step={step} and --stage={stage} conflict; give only one of them")
    if not is_foreign(path):
        loaded = loading.load_params(path, step, stage, mesh, _weights)
        return dataclasses.replace(loaded, params=cast(loaded.params, jnp.dtype(dtype)), stop_ids=stop_ids(path))
    for name, value, only in (("step", step, 0), ("stage", stage, STAGE)):
        if value is not None and value != only:
            raise UserError(
                f"{path} is a {'GGUF file' if is_gguf(path) else 'Hugging Face model'}, which has no {name} {value!r}; omit it"
            )
    source = opened(path)
    run = _run_of(source, dtype)
    return Loaded(_read(source, path, dtype, mesh), run, _meta_of(run, source), stop_ids(path))


def job_mesh(path: str | Path) -> Mesh | None:
    """The mesh for the weights of a model in all processes of a job: that of its run, if it fits; None for a process alone."""
    if processes.count() == 1:
        return None
    devices = jax.devices()
    if not is_foreign(path) and Path(path).is_dir():
        config = loading.config_of(loading.locate(Path(path))[0]).evaluation_mesh
        try:
            return make_mesh(config, devices)
        except UserError as error:
            warn(f"the mesh of the run in {path} does not fit here ({error}); its weights are split over all devices instead")
    return make_mesh(MeshConfig(), devices)


def initial_weights(init_from: str | None) -> InitialWeights | None:
    """The weights that a run begins with, of either kind; None without any."""
    return None if init_from is None else _weights(init_from)


def _weights(init_from: str) -> InitialWeights:
    keep = functools.partial(copy_hf_files, init_from)
    if not is_foreign(init_from):
        given = loading.initial_weights(init_from)
        read = functools.partial(loading.load_params, init_from, None, None, get_weights=_weights)
        return dataclasses.replace(given, keep=keep, load=lambda mesh, hold: loading.as_held(read(mesh), hold))
    source = opened(init_from)
    run = _run_of(source, "float32")
    meta = _meta_of(run, source)

    def load(mesh: Mesh | None, hold: Hold | None) -> Loaded:
        return Loaded(_read(source, init_from, "float32", mesh, hold), run, meta)

    return InitialWeights(init_from, meta, load, lambda: sampled_hash(source.files), keep)


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
    """Where what is found out about a model is kept: in its run, and for one that is not lcx's own under runs/."""
    return Path("runs") / stem(Path(path).resolve()) if is_foreign(path) else loading.locate(Path(path))[0]


def short_name(path: str | Path, loaded: Loaded) -> str:
    """What tells loaded weights from others with the same `workdir_of`: their step, or where one that is not lcx's own lies."""
    if not is_foreign(path):
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
    """Write the weights of a Hugging Face folder or a GGUF file as a run's checkpoint at step 0, in `dtype` (None: as stored).

    What a GGUF file stores in blocks becomes float32.
    """
    source = Path(source)
    if not is_gguf(source) and not source.is_dir():
        if source.exists():
            raise UserError(f"{source} is neither a directory nor a GGUF file; name the folder that it is in")
        raise UserError(f"{source} does not exist; fetch a model first, for example with huggingface_hub's `hf download`")
    given = opened(source)
    dtype = _dtype(dtype, given.dtype)
    if (workdir / CONFIG).exists():
        raise UserError(f"{workdir} already holds a run; name another --workdir")
    if (workdir / FOLDER).exists():
        raise UserError(f"{workdir} holds checkpoints without a config.json; name another --workdir, or delete it")
    run = _run_of(given, dtype)
    _check_tokenizer(run)
    if hf.tokenizer_files(_files(source)):
        run = dataclasses.replace(run, data=DataConfig(tokenizer=str(workdir / HF_FOLDER)))
    params = given.params(dtype, mesh)
    # No process looks for a run in the workdir when another has begun to make one.
    processes.meet("import")
    open_workdir(workdir, run)
    try:
        copy_hf_files(str(source), workdir)
        with Store(workdir, CheckpointConfig(), stage_ends(run)) as store:
            store.save_params(params, _meta_of(run, given))
    except BaseException:
        # A config without weights would be a run that there is not.
        (workdir / CONFIG).unlink(missing_ok=True)
        shutil.rmtree(workdir / FOLDER, ignore_errors=True)
        raise
    say(f"imported {num_elements(params):,} parameters as {dtype} ({size(num_bytes(params))}) into {workdir}")


def export_model(
    checkpoint: str | Path, out: Path, step: int | None = None, stage: str | None = None, mesh: Mesh | None = None,
    dtype: str | None = None, max_shard_bytes: int = hf.MAX_SHARD_BYTES, form: str = "hf", base_folder: str | Path | None = None,
    base_model: str | None = None,
) -> None:  # fmt: skip
    """Write the weights of a run as a Hugging Face folder, or with `form` "gguf" as a GGUF file, or its adapters with "peft".

    `dtype` None is that of the model it began with, else float32; a GGUF file may also be `q8_0`. An adapter names `base_folder` as
    the model below it (None: what the run began with). A model card is written with it, which calls the model that it began with
    `base_model`, its name on the Hub. Raises `UserError` if `out` exists, and for what the format cannot represent.
    """
    choice("format", form, FORMATS)
    check_hub_name(base_model)
    if form == "peft":
        return _export_adapter(Path(checkpoint), out, step, stage, dtype, base_folder, base_model)
    if base_folder is not None:
        raise UserError(f"--base={base_folder} names the model below an adapter; it goes with --format=peft")
    base = _kept(Path(checkpoint))
    stored = values_of(base) if base else {}
    stored = stored.get("dtype") or stored.get("torch_dtype")
    as_gguf = form == "gguf"
    dtype = choice("dtype", dtype or _dtype(None, stored), GGUF_DTYPES) if as_gguf else _dtype(dtype, stored)
    (gguf if as_gguf else hf).check_new(out)
    loaded = load(checkpoint, step=step, stage=stage, mesh=mesh)
    model = loaded.run.model
    name = loaded.run.data.tokenizer
    if base is not None and not is_tokenizer_of(name, base):
        raise UserError(
            f"{checkpoint} was trained with the tokenizer {name!r}, but the model it was trained from has another one, which would "
            "be exported with the weights; train with that model's own"
        )
    schemes = build_schemes(model, loaded.schemes)
    workdir = None if is_foreign(checkpoint) else loading.locate(Path(checkpoint))[0]
    if as_gguf:
        with tempfile.TemporaryDirectory() as made:
            own = base if base is not None and hf.tokenizer_files(base) else Path(made)
            if own != base:
                write_tokenizer(name, tokenizers.load(name), own)
            values = gguf.save(out, loaded.params, model, schemes, loaded.meta.length, dtype, own, base)
        _say_exported(loaded, dtype, values, out)
        write_card(out, form, dtype, values, loaded, checkpoint, workdir, base, base_model)
        if jax.process_index() == 0:
            manifest.write(out.parent, [out.name], manifest.next_to(out).name)
        return
    tokenizer = None if base else tokenizers.load(name)
    values = hf.save(
        out, loaded.params, model, schemes, loaded.meta.length, dtype, base, max_shard_bytes,
        tokenizer and tokenizer.bos_id, tokenizer and tokenizer.eos_id,
    )  # fmt: skip
    if jax.process_index() != 0:
        return
    if tokenizer is not None:
        write_tokenizer(name, tokenizer, out, loaded.meta.length)
    if not hf.tokenizer_files(out):
        warn(f"the tokenizer {name!r} was not exported; copy its files into {out}")
    _say_exported(loaded, dtype, values, out)
    write_card(out, form, dtype, values, loaded, checkpoint, workdir, base, base_model)
    manifest.write(out)


def _export_adapter(
    checkpoint: Path, out: Path, step: int | None, stage: str | None, dtype: str | None, base_folder: str | Path | None,
    base_model: str | None,
) -> None:  # fmt: skip
    if dtype not in (None, "float32"):
        raise UserError(f"--dtype={dtype} does not apply to --format=peft: an adapter is written as it was trained, in float32")
    if is_foreign(checkpoint):
        raise UserError(f"{checkpoint} is not a run of lcx's; name the workdir of one that trained adapters")
    hf.check_new(out)
    adapted = loading.load_unfolded(checkpoint, step, stage, get_weights=_weights)
    run, meta = adapted.run, adapted.meta
    if run.adapters is None:
        raise UserError(f"the run in {checkpoint} trained no adapters (config.lora.rank is None); use --format=hf or gguf")
    base = Path(base_folder if base_folder is not None else str(run.init_from))
    if not hf.is_folder(base):
        raise UserError(
            f"the base {base} is not a Hugging Face folder, which peft needs below an adapter; write it with lcx export, and name "
            "that folder with --base"
        )
    schemes = build_schemes(run.model, adapted.schemes)
    model_type = values_of(base)["model_type"]
    trained = frozenset(path for path, _ in paths(adapted.params) if run.is_kept(path))
    values = peft_save.save(
        out,
        peft_save.Adapted(adapted.params, trained, run.lora.rank_stabilized),
        Described(model_type, run.model, schemes, meta.length),
        base,
        {"length": meta.length, "positions": meta.positions, "base": meta.base, "stage": meta.stage, "step": meta.step},
    )
    if jax.process_index() == 0:
        say(
            f"exported the adapters of {checkpoint} into {out}: rank {values['r']} on {', '.join(values['target_modules'])}; step "
            f"{meta.step} of stage {meta.stage}, for {meta.length:,} tokens, on top of {base}"
        )
        write_card(
            out, "peft", "float32", values_of(out), adapted, checkpoint, loading.locate(checkpoint)[0], base, base_model,
            adapter=Adapter(values["r"], str(base)),
        )  # fmt: skip
        manifest.write(out)


def _say_exported(loaded: Loaded, dtype: str, values: dict[str, Any], out: Path) -> None:
    if jax.process_index() != 0:
        return
    say(
        f"exported {num_elements(loaded.params):,} parameters as {dtype}, {values['architectures'][0]}, into {out}: step "
        f"{loaded.meta.step} of stage {loaded.meta.stage}, for {loaded.meta.length:,} tokens"
    )


def _dtype(asked: str | None, stored: str | None) -> str:
    return choice("dtype", asked or (stored if stored in DTYPES else "float32"), DTYPES)


def _check_tokenizer(run: RunConfig) -> None:
    count = tokenizers.load(run.data.tokenizer).vocab_size
    if count > run.model.vocab_size:
        raise UserError(
            f"the tokenizer in {run.data.tokenizer} has ids up to {count - 1}, but the model's vocabulary ends at "
            f"{run.model.vocab_size - 1}; it belongs to another model, so replace it with this model's own"
        )


def _run_of(source: Source, dtype: str) -> RunConfig:
    model = source.described.model
    if source.described.ignored:
        say(f"{source.folder}: keys of config.json that change nothing: {', '.join(source.described.ignored)}", stderr=True)
    execution = ExecutionConfig(compute_dtype="float32" if dtype == "float32" else "bfloat16")
    stage = StageConfig(name=STAGE, seq_len=source.described.length, steps=1, batch_size=1, monitor=False)
    data = DataConfig(tokenizer=tokenizer_of(source.folder, model))
    positions = scheme_configs(source.described.schemes)
    return RunConfig(model, (stage,), execution, positions, data, init_from=str(source.folder))


def _meta_of(run: RunConfig, source: Source) -> Meta:
    return Meta(
        stage=STAGE, stage_index=0, attempt=0, stage_step=0, step=0, length=source.described.length, seed=run.seed,
        config=fingerprint(run), positions=scheme_configs(source.described.schemes),
    )  # fmt: skip


def tokenizer_of(folder: Path, model: ModelConfig) -> str:
    """What `DataConfig.tokenizer` says for the tokenizer of a folder or GGUF file, or for the bytes of a model without one."""
    if hf.tokenizer_files(_files(folder)):
        return str(folder)
    if model.vocab_size not in (256, 257, 258):
        warn(f"{folder} has no tokenizer; text is read as bytes")
    return {257: "bytes+eos", 258: "bytes+bos+eos"}.get(model.vocab_size, "bytes")


def _files(path: Path) -> Path:
    """The folder with the files next to the weights of a model that is not lcx's own: itself, or what a GGUF file contains."""
    if is_gguf(path):
        return gguf.files(path)
    return opened(path).base.folder if peft.is_adapter(path) and not hf.tokenizer_files(path) else path


def _kept(path: Path) -> Path | None:
    """The folder with the Hugging Face files of a model: its own, or what its run kept."""
    if is_foreign(path):
        return _files(path)
    kept = loading.locate(path)[0] / HF_FOLDER
    if kept.is_dir():
        hf.check_folder(kept)
        return kept
    return None


def is_tokenizer_of(name: str, folder: Path) -> bool:
    """May `DataConfig.tokenizer` say `name` for the model in `folder`? As far as files tell: one without any takes all."""
    own, given = hf.tokenizer_files(_files(folder)), _files(Path(name).expanduser())
    if not own or name == str(folder):
        return True
    others = hf.tokenizer_files(given) if given.is_dir() else []
    return [(path.name, path.read_bytes()) for path in own] == [(path.name, path.read_bytes()) for path in others]


def write_tokenizer(name: str, tokenizer: tokenizers.Tokenizer, out: Path, length: int = 0) -> None:
    """Copy a run's tokenizer into the directory of an exported model of up to `length` tokens."""
    if tokenizer.folder is None:
        byte_tokenizer.write(out, "+bos" in name, "+eos" in name)
        return
    hf.copy_companions(tokenizer.folder, out, length)
