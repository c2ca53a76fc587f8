"""Filter and deduplicate sources of text into JSONL files that runs read, and make long or synthetic ones. Rerun to resume.

lcx data curate --config=configs/data/long_mixture.py --config.sources.books.source.path='books/**/*.txt' --out=data/curated
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from lcx.cli import config_flags
from lcx.core import configs, numbers
from lcx.core.console import say, table
from lcx.core.errors import UserError
from lcx.core.host import cores
from lcx.data.curation import cluster
from lcx.data.curation.config import CurationConfig
from lcx.data.curation.embed import EmbedConfig, Embedder
from lcx.data.curation.labels import Ask, EndpointLabels
from lcx.data.curation.pipeline import REPORT, Progress, curate
from lcx.data.curation.scores import ScorerFactory
from lcx.data.curation.synthesize.generator import Generator
from lcx.data.curation.synthesize.settings import GeneratorConfig
from lcx.data.curation.synthesize.stage import asking


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    config_flags.define(values, workdir=False)
    flags.DEFINE_string(
        "out",
        None,
        "directory to write to: a folder of JSONL files per source, report.json, and report.html to look at",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "workers", None, "processes that judge documents (default: one per CPU, with Ray of the cluster)", flag_values=values
    )
    flags.DEFINE_enum("engine", "processes", ("processes", "ray"), "what runs them (ray: extra ray)", flag_values=values)
    flags.DEFINE_string(
        "ray_address", None, "with --engine=ray: the cluster to join (default: RAY_ADDRESS, or a local one)", flag_values=values
    )
    flags.DEFINE_bool(
        "dry_run",
        False,
        "say how much config.synthesize would ask its model, and ask nothing; without it, go on",
        flag_values=values,
    )


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Curate the sources."""
    given = config_flags.chosen(values, rest)
    if "stages" in given:
        raise UserError(
            f"--config={config_flags.filename(values)} is the config of a run; name one of a curation, such as "
            "configs/data/long_mixture.py"
        )
    config = configs.build(CurationConfig, given.to_dict(), "config")
    if not values.out:
        raise UserError("--out is missing; name the directory to write, such as --out=data/curated")
    workers = cores() if values.workers is None else values.workers
    if workers < 1:
        raise UserError(f"--workers={workers} must be at least 1")
    if values.ray_address is not None and values.engine != "ray":
        raise UserError(f"--ray_address={values.ray_address} needs --engine=ray; add it")
    scorers, embedders = _scorers(config), {"hidden": _hidden}
    with cluster.engine(values.ray_address, values.workers) if values.engine == "ray" else contextlib.nullcontext() as run:
        progress = _progress(time.perf_counter())
        found = curate(
            config, values.out, workers, progress, scorers, embedders, _ask, run, generator=_generator, dry_run=values.dry_run
        )
    if "requests" in found:
        _show_requests(found["requests"], config)
        return
    for name, of in found["sources"].items():
        _show(name, of)
    for name, learned in found.get("scores", {}).items():
        if "rounds" in learned:
            _show_classifier(name, learned)
    if variety := found.get("diversity"):
        say(f"diversity: {variety['kept']:,} of {variety['documents']:,} documents, embedding: {variety['embedding']}")
        scores = f"{variety['vendi_before']:,.1f} before, {variety['vendi_after']:,.1f} after"
        say(f"    Vendi score {scores}, {variety['vendi_random']:,.1f} of as many drawn at random")
    if "evaluation" in found:
        known = found["evaluation"]
        short = f"{known['texts_too_short']:,} texts too short to find"
        say(f"evaluation files: {known['texts']:,} texts, {known['ngrams']:,} n-grams; {short}")
    for name, of in found.get("assembled", {}).items():
        _show_assembled(name, of)
    for name, of in found.get("synthesized", {}).items():
        _show_synthesized(name, of, config.generator)
    # Loaded only now: what is wrong with a config is said without the libraries that draw.
    from lcx.report import curation_page

    say(f"report: {Path(values.out, REPORT)}")
    say(f"page to look at: {curation_page.write(values.out)}")
    say("to tokenise a source for training:")
    written = {name: of["kept"] for name, of in found["sources"].items()}
    written |= {name: of["out"] for name, of in found.get("assembled", {}).items()}
    synthesized = found.get("synthesized", {})
    written |= {name: of["out"] for name, of in synthesized.items() if not of["chat"]}
    for name, of in written.items():
        if of["documents"]:
            pattern = _pattern(values.out, name)
            say(f"    lcx data prepare --kind=jsonl --path={pattern!r} --tokenizer=TOKENIZER --out={Path('data', name)}")
    if chats := [name for name, of in synthesized.items() if of["chat"] and of["out"]["documents"]]:
        say("to train on conversations, in a config:")
        for name in chats:
            say(f"    config.data.parts.NAME.source = {{'kind': 'chat', 'path': {_pattern(values.out, name)!r}}}")


def _pattern(out: str, name: str) -> str:
    return str(Path(out, name, "*.jsonl"))


def _scorers(config: CurationConfig) -> dict[str, ScorerFactory]:
    """Kinds of scores that take a model, whose libraries are not loaded without a score."""
    if not config.scores:
        return {}
    from lcx.recipes.scorers import factories

    return factories()


def _show(name: str, of: dict[str, Any]) -> None:
    """What became of one source."""
    rows = [("read", f"{of['read']['documents']:,}", f"{of['read']['bytes']:,}", "")]
    for stage, dropped in of["dropped"].items():
        if dropped["documents"]:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped["reasons"].items())
            rows.append((f"dropped by {stage}", f"{dropped['documents']:,}", f"{dropped['bytes']:,}", reasons))
    rows.append(("kept", f"{of['kept']['documents']:,}", f"{of['kept']['bytes']:,}", ""))
    table(name, (of["source"], "documents", "bytes", "reasons"), rows)
    if scores := of.get("scores"):
        counts = ("documents", "missing", "failed")
        columns = [tuple(f"{one[key]:,}" for key in counts) + tuple(map(_number, one["deciles"][::5])) for one in scores.values()]
        rows = [(score, *column) for score, column in zip(scores, columns, strict=True)]
        table(f"{name}: scores", ("score", *counts, "minimum", "median", "maximum"), rows)


def _hidden(config: EmbedConfig) -> Embedder:
    # Loads jax, which a curation that asks no model does without.
    from lcx.recipes import hidden

    return hidden.embedder(config)


def _ask(config: EndpointLabels) -> Ask:
    from lcx.recipes import labelling

    return labelling.ask(config)


def _generator(config: GeneratorConfig) -> Generator:
    from lcx.recipes import synthesis

    return synthesis.generator(config)


def _show_requests(requests: dict[str, Any], config: CurationConfig) -> None:
    """What a model would be asked."""
    if not requests:
        say("no source of config.synthesize asks a model; nothing would be sent")
    for name, counted in requests.items():
        assert config.generator is not None
        say(f"{name}: {asking(counted, config.generator.where)}")
        least, left = counted["input_tokens"], counted["requests"] - counted["answered"]
        if (cost := config.generator.cost(least, 0)) is not None:
            most = config.generator.cost(least, left * config.generator.max_tokens)
            answers = f"answers of {config.generator.max_tokens:,} tokens"
            say(f"    cost: about {cost:,.4g} for the requests, at most {most:,.4g} with {answers}")


def _show_classifier(name: str, learned: dict[str, Any]) -> None:
    """What a quality classifier was made of, and how good it is on labels that it has not seen."""
    labels, last = learned["labels"], learned["rounds"][-1]
    say(f"{name}: learned from {labels['used']:,} labels ({labels['from']}), embedding: {learned['embedding']}")
    figures = ", ".join(
        f"{key} {'none' if last[key] is None else format(last[key], '.3f')}" for key in ("auc", "precision", "recall")
    )
    say(f"    on {sum(learned['held_out'].values()):,} held-out labels: {figures}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _show_assembled(name: str, of: dict[str, Any]) -> None:
    """What became of the documents that one assembled source was made of."""
    lengths = {where: f"{found['median']:,.0f} {of['unit']} (median)" for where, found in of["lengths"].items()}
    rows = [("taken", f"{of['in']['documents']:,}", f"{of['in']['bytes']:,}", lengths["before"])]
    rows += [(f"left over: {why}", f"{left['documents']:,}", f"{left['bytes']:,}", "") for why, left in of["left_over"].items()]
    rows.append(("assembled", f"{of['out']['documents']:,}", f"{of['out']['bytes']:,}", lengths["after"]))
    table(name, (f"{of['method']} of {', '.join(of['sources'])}", "documents", "bytes", "length"), rows)


def _show_synthesized(name: str, of: dict[str, Any], generator: GeneratorConfig | None) -> None:
    """What became of one source that was generated."""
    rows = [("taken", f"{of['in']['documents']:,}", f"{of['in']['bytes']:,}", "")]
    rows += [(f"left over: {why}", f"{left['documents']:,}", f"{left['bytes']:,}", "") for why, left in of["left_over"].items()]
    answers = ", ".join(f"{reason} {count:,}" for reason, count in of.get("answers", {}).items())
    rows.append(("written", f"{of['out']['documents']:,}", f"{of['out']['bytes']:,}", answers))
    table(name, (f"{of.get('task', of['method'])} of {', '.join(of['sources'])}", "documents", "bytes", "answers"), rows)
    if "tokens" in of:
        counted, cost = of["tokens"], of["cost"]
        guess = f" ({counted['estimated_requests']:,} requests estimated)" if counted["estimated_requests"] else ""
        tokens = f"{counted['input']:,} tokens in, {counted['output']:,} out{guess}"
        price = "" if cost is None else f"; cost {cost:,.4g}"
        if cost is None and generator is not None and generator.endpoint is not None:
            price = "; cost not known, as generator.price_per_million_input and _output are not set"
        say(f"    {of['requests']:,} requests to {of['model']}: {tokens}{price}")


def _progress(start: float) -> Callable[[Progress], None]:
    """Says every few seconds how far it is."""
    last = start

    def report(progress: Progress) -> None:
        nonlocal last
        if progress.note:
            say(f"{progress.source}: {progress.note}")
            return
        now = time.perf_counter()
        if now - last >= 5:
            last = now
            speed = progress.fresh_bytes / 1e6 / (now - start)
            done = f"{numbers.counted(progress.shards, 'shard')} {progress.done}, {progress.bytes / 1e6:,.0f} MB, {speed:,.1f} MB/s"
            say(f"{progress.source}: {done}")

    return report
