"""A merge from its YAML file to a new folder: checked, shown or written tensor by tensor."""

from __future__ import annotations

import collections
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcx.core.console import say, table, warn
from lcx.core.errors import UserError
from lcx.core.numbers import counted, size
from lcx.interop.folder import created, files_with_weights, raise_tokenizer_length, refuse_full_disk, tokenizer_files
from lcx.interop.hf_config import FILE, read_json
from lcx.merging import models as checks
from lcx.merging.apply import open_model
from lcx.merging.config import MergeConfig, read
from lcx.merging.models import LAYER_COUNTS, LENGTH, PER_LAYER, Model, config_text, with_rotary
from lcx.merging.plan import NO_EFFECT, Job, Plan, PlanBuilder, kind
from lcx.merging.stream import MAX_SHARD_BYTES, Work, stream

TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"


class Merge:
    """What a YAML file asks for, with everything checked that can be before a number is read."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config: MergeConfig = read(self.path)
        self.models = {name: open_model(name) for name in self.config.paths}
        every = list(self.models.values())
        checks.same_architecture(every, whole=self.config.models is not None)
        self.rotary = checks.rotary_source(every, self.config.rotary_source)
        try:
            self.plan: Plan = PlanBuilder(self.config, self.models).plan()
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        self.main = self.models[self.config.base_model] if self.config.base_model else self.plan.jobs[0].models[0].model
        """The model whose config.json, tokenizer and other files the result gets."""
        self.tokenizer = self._tokenizer()
        for model in every:
            checks.same_vocabulary(self.tokenizer, model.folder)
        self.template = self._template(every)
        self.bytes = sum(job.stored.bytes for job in self.plan.jobs)

    def show(self, out: Path) -> None:
        """Print what would be done, and whether there is room for it."""
        self._warn()
        refuse_full_disk(out, self.bytes)
        jobs: dict[str, list[Job]] = collections.defaultdict(list)
        for job in self.plan.jobs:
            jobs[kind(job.name)].append(job)
        columns = ("tensors", "number", "shape", "first layer", "last layer")
        rows = []
        for name, found in jobs.items():
            first, last = (_values(found[i]) for i in (0, -1))
            shape = "x".join(map(str, found[0].stored.shape))
            rows.append((name, len(found), shape, first, "" if last == first else last))
        table(self.config.merge_method, columns, rows)
        settings = [
            (name, model.layers, checks.rotary_text(model.values), "counts" if model is self.rotary else "")
            for name, model in self.models.items()
        ]
        table("rotary settings", ("model", "layers", "settings", ""), settings)
        free = shutil.disk_usage(next(path for path in out.absolute().parents if path.exists())).free
        types = ", ".join(sorted({job.stored.dtype for job in self.plan.jobs}))
        left = f"the disk has {size(free)} left"
        say(f"would write {self.plan.numbers:,} parameters as {types} ({size(self.bytes)}) into {out}; {left}")

    def write(self, out: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Write the result as a new folder, which is there whole or not at all."""
        self._warn()
        start = time.perf_counter()
        with created(out, self.bytes) as part:
            stream(part, self._works(), "merge", max_shard_bytes, self.config.seed)
            self._companions(part)
            values = self._values()
            (part / FILE).write_text(config_text(values), encoding="utf-8")
            raise_tokenizer_length(part, values.get(LENGTH, 0))
            (part / "README.md").write_text(self._card(out), encoding="utf-8")
        seconds = time.perf_counter() - start
        merged = {one.model.folder for job in self.plan.jobs for one in job.models}
        what = counted(len(merged), "model") + (" and a base" if any(job.base for job in self.plan.jobs) else "")
        figures = f"{self.plan.numbers:,} parameters, {size(self.bytes)}, in {seconds:,.1f} s"
        say(f"merged {what} by {self.config.merge_method} into {out}: {figures}")

    def _works(self) -> list[Work]:
        def work(job: Job) -> Work:
            models = tuple((one.model.reader, one.name) for one in job.models)
            base = None if job.base is None else (job.base.model.reader, job.base.name)
            return Work(job.name, job.stored, models, base, lambda tensor, write: self.plan.method.apply(tensor, job.values, write))

        return [work(job) for job in self.plan.jobs]

    def _warn(self) -> None:
        for path in self.plan.unused:
            why = "changes nothing here" if path.endswith(NO_EFFECT) else f"is not a parameter of {self.config.merge_method}"
            warn(f"{self.path}: {path} {why}")

    def _tokenizer(self) -> Path:
        """The folder whose tokenizer the result gets."""
        named = self.config.tokenizer_of
        if named == "union":
            raise UserError(
                f"{self.path}: tokenizer_source=union needs embeddings for tokens that a model does not know; lcx merges models of "
                "one vocabulary: set tokenizer_source to base, or to one of the models"
            )
        folder = self.main.folder if named in (None, "base") else Path(str(named)).expanduser()
        if not folder.is_dir():
            raise UserError(f"{self.path}: tokenizer_source={named!r} is neither 'base' nor the folder of a model; name one")
        if named is not None and not tokenizer_files(folder):
            raise UserError(f"{self.path}: tokenizer_source={named!r}: {folder} has no tokenizer; name another model")
        return folder

    def _template(self, every: Sequence[Model]) -> str | None:
        """The text of the result's chat template, if the file says which; raises `UserError` for one that is not known."""
        named = self.config.chat_template
        if named is None:
            return None
        if named == "auto":
            found = [text for model in every if (text := template(model.folder))]
            return collections.Counter(found).most_common(1)[0][0] if found else None
        if "{" in named:
            return named
        if named.endswith(".jinja") and Path(named).is_file():
            return Path(named).read_text(encoding="utf-8")
        raise UserError(
            f"{self.path}: chat_template={named!r} is neither auto, nor a template's text, nor a .jinja file that exists"
        )

    def _companions(self, part: Path) -> None:
        """Tokenizer, chat template and generation settings."""
        files = {path.name: path for path in files_with_weights(self.tokenizer) if path.name != GENERATION}
        files |= {path.name: path for path in files_with_weights(self.main.folder) if path.name == GENERATION}
        for name, path in files.items():
            if self.template is None or not name.startswith("chat_template"):
                shutil.copyfile(path, part / name)
        if self.template is not None:
            (part / TEMPLATE).write_text(self.template, encoding="utf-8")
            if (path := part / TOKENIZER_CONFIG).exists():
                values = {key: value for key, value in read_json(path).items() if key != "chat_template"}
                path.write_text(config_text(values), encoding="utf-8")

    def _values(self) -> dict[str, Any]:
        """The result's config.json."""
        values = dict(self.main.values)
        layers = self.plan.layers
        for key in LAYER_COUNTS:
            if key in values:
                values[key] = len(layers)
        for key in PER_LAYER:
            if isinstance(values.get(key), list) and len(values[key]) == self.main.layers:
                values[key] = [model.values[key][layer] for model, layer in layers]
        if self.rotary is not self.main:
            values = with_rotary(values, self.rotary.values)
        if self.config.out is not None:
            values |= {"dtype": self.config.out, "torch_dtype": self.config.out}
        return values

    def _card(self, out: Path) -> str:
        names = [Path(name).name for name in self.models]
        listed = "".join(f"- {name}\n" for name in names)
        front = "---\nlibrary_name: transformers\ntags:\n- merge\n---\n"
        about = f"# {out.name}\n\nMerged by `{self.config.merge_method}` with lcx (`lcx merge`), in float32, of\n\n{listed}\n"
        return f"{front}{about}```yaml\n{self.path.read_text(encoding='utf-8-sig').strip()}\n```\n"


def template(folder: Path) -> str | None:
    """A folder's chat template; None without one."""
    if (path := folder / TEMPLATE).is_file():
        return path.read_text(encoding="utf-8")
    if (path := folder / TOKENIZER_CONFIG).is_file():
        found = read_json(path).get("chat_template")
        return found if isinstance(found, str) else None
    return None


def _values(job: Job) -> str:
    """The parameters of a tensor in a line."""
    found = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in job.values.tensor.items()]
    each: Mapping[str, Any] = job.values.models[0] if job.values.models else {}
    for key in each:
        values = [model[key] for model in job.values.models]
        found.append(f"{key}={', '.join(f'{value:g}' for value in values)}")
    return "; ".join(found)
