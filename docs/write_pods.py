"""The tables of docs/pods.md, from lcx's own plans and from what compilers said of the same steps, which docs/pods.json keeps.

python docs/write_pods.py                       the page, from arithmetic and what is kept
python docs/write_pods.py --compile=NAME,NAME   compile these first (or `all`, or `missing`), each takes a minute and 2 GiB
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcx.cli import parse
from lcx.core import configs
from lcx.core.errors import UserError
from lcx.core.numbers import duration, step_time
from lcx.model.presets import family
from lcx.planning import plan as planning
from lcx.planning import search
from lcx.planning.compile import Compiled, compile_step
from lcx.planning.plan import StagePlan
from lcx.planning.published import ROWS
from lcx.planning.topology import topology
from lcx.recipes.recipe import recipe
from lcx.report import style
from lcx.training.stages import RunConfig, run_config

HERE = Path(__file__).parent
CONFIGS = sorted(path for path in (HERE.parent / "configs" / "pods").glob("*.py") if path.stem != "base")
SEVENTY = {"model_dim": 8192, "num_layers": 80, "num_heads": 64, "mlp_dim": 28672}
M = 2**20

LARGEST: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "8B, v5p, 4 chips": ("v5p:2x2x1", {}, {}, ""),
    "8B, v5p, 8 chips": ("v5p:2x2x2", {}, {}, "UPipe 5M on 8 H100, ALST 3.8M on 8 H100"),
    "8B, v5p, 64 chips": ("v5p:4x4x4", {}, {}, "MaxText 10.5M with fewer heads"),
    "8B, v5e, 256 chips": ("v5e:16x16", {}, {}, "Ring Attention 2M for 7B"),
    "70B, v5p, 64 chips": ("v5p:4x4x4", SEVENTY, {}, "ALST 10M on 64 H100"),
}
"""Name -> topology, changes of Llama 3.1 8B, changes of how it is computed, and what others reach."""

CHECKED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "8B, 1M tokens, v5p, 4 chips, remat=nested": ("v5p:2x2x1", M, {"remat": "nested"}),
    "8B, 2M tokens, v5p, 8 chips, remat=nested": ("v5p:2x2x2", 2 * M, {"remat": "nested"}),
    "8B, 6M tokens, v5p, 8 chips, remat=nested_offload": ("v5p:2x2x2", 6 * M, {"remat": "nested_offload"}),
    "8B, 24M tokens, v5p, 64 chips, remat=nested": ("v5p:4x4x4", 24 * M, {"remat": "nested"}),
    "8B, 12M tokens, v5e, 256 chips, remat=nested": ("v5e:16x16", 12 * M, {"remat": "nested"}),
    "8B, 16M tokens, v5p, 512 chips, remat=nested": ("v5p:8x8x8", 16 * M, {"remat": "nested"}),
    "8B, 1M tokens, v5p, 8 chips": ("v5p:2x2x2", M, {}),
    "8B, 128K tokens, v5p, 8 chips": ("v5p:2x2x2", M // 8, {}),
    "8B, 1M tokens, v5p, 8 chips, remat=attention": ("v5p:2x2x2", M, {"remat": "attention"}),
    "8B, 1M tokens, v5p, 8 chips, remat=offload": ("v5p:2x2x2", M, {"remat": "offload"}),
    "8B, 4M tokens, v5e, 256 chips": ("v5e:16x16", 4 * M, {}),
    "8B, 8M tokens, v5e, 256 chips, remat=offload": ("v5e:16x16", 8 * M, {"remat": "offload"}),
}
"""Steps that are compiled beside those of the recipes: name -> topology, tokens, changes of how it is computed."""


def stock(length: int, model: dict[str, Any], execution: dict[str, Any]) -> RunConfig:
    """Llama 3.1 8B in full fine-tuning, float32 weights and Adam, all chips sharing one row."""
    chosen = family("llama31_8b")
    return run_config(
        {
            "model": {**configs.plain(chosen.model), **model},
            "positions": configs.plain(chosen.positions),
            "execution": {"compute_dtype": "bfloat16", "remat": "block", **execution},
            "mesh": {"fsdp": 1, "context": -1},
            "stages": [{"name": "long", "seq_len": length, "steps": 1, "batch_size": 1}],
        }
    )


def of_config(path: Path) -> tuple[RunConfig, str]:
    """The run of a config file and the chips that it names."""
    return recipe(parse.load(str(path))).run, runpy.run_path(str(path))["TOPOLOGY"]


@dataclasses.dataclass(frozen=True)
class Kept:
    """What compilers said, by name."""

    path: Path

    def read(self) -> dict[str, Any]:
        """All of it."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def add(self, name: str, run: RunConfig, index: int, where: str) -> None:
        """Compile a stage and keep what is said; what a compiler cannot do is kept as its sentence."""
        known = self.read()
        try:
            found = compile_step(run, index, topology(where))
            known[name] = {**dataclasses.asdict(found), "collectives": []}
        except UserError as error:
            known[name] = {"error": str(error)}
        self.path.write_text(json.dumps(known, indent=1) + "\n")

    def compiled(self, name: str) -> Compiled | None:
        """What was said of a name."""
        found = self.read().get(name)
        return None if found is None or "memory" not in found else Compiled(**{**found, "collectives": ()})


KEPT = Kept(HERE / "pods.json")


def programs() -> dict[str, tuple[RunConfig, int, str]]:
    """All steps that are compiled for the page: name -> run, stage, topology."""
    found = {name: (stock(length, {}, how), 0, where) for name, (where, length, how) in CHECKED.items()}
    for path in CONFIGS:
        run, where = of_config(path)
        found[path.stem] = (run, planning.fullest(run, topology(where)), where)
    return found


def recipes_table() -> str:
    """All recipes' stages."""
    rows = []
    for path in CONFIGS:
        run, where = of_config(path)
        chips, index = topology(where), planning.fullest(run, topology(where))
        plans = [planning.stage_plan(run, i, chips) for i in range(len(run.stages))]
        said = KEPT.compiled(path.stem)
        for i, one in enumerate(plans):
            compiled = f"{said.needed / 1e9:.1f}" if said is not None and i == index else ""
            name = f"[{path.stem}](../configs/pods/{path.name}), {where}" if i == 0 else ""
            rows.append([name, *stage_cells(one, compiled)])
        total = planning.totals(plans)
        rows.append(
            ["", "**all**", "", "", "", "", "", f"**{duration(3600 * total['hours'])}**", f"**{total['chip_hours']:,.0f}**"]
        )
    heads = ["recipe", "tokens a row", "mesh", "GB", "compiled", "step", "MFU", "time", "chip-hours"]
    return markdown(heads, rows)


def stage_cells(one: StagePlan, compiled: str) -> list[str]:
    """The figures of a stage."""
    mesh = " ".join(f"{axis} {count}" for axis, count in one.mesh.items() if count > 1)
    step = [step_time(one.time.seconds), f"{one.time.mfu:.0%}", duration(3600 * one.hours), f"{one.chip_hours:,.0f}"]
    return [style.tokens(one.stage.seq_len), mesh, f"{one.needed / 1e9:.1f}", compiled, *step]


def largest_table() -> str:
    """The longest rows that fit by arithmetic, with nothing on the host and with something there: those of the best policy.

    Arithmetic is raised by what it misses in the worst case of those that were compiled with such a policy.
    """
    rows = []
    for name, (where, model, execution, peers) in LARGEST.items():
        cells = []
        for policies in (("block", "nested"), ("offload", "nested_offload")):
            plans, ratio = [], lowest(policies)
            for policy in policies:
                try:
                    run = stock(M, model, {**execution, "remat": policy})
                    plans.append(search.find("context", run, 0, topology(where), ratio)[0].plan)
                except UserError:
                    continue
            if plans:
                best = max(plans, key=lambda plan: plan.stage.seq_len)
                host = f" + {best.host / 1e9:.0f} on the host" if best.host else ""
                cells.append(f"{best.stage.seq_len / M:.2f}M, `{best.work.policy}` ({best.needed / 1e9:.0f} GB{host})")
            else:
                cells.append("none")
        rows.append([name, *cells, peers])
    return markdown(["full fine-tuning on", "nothing on the host", "layers' inputs on the host", "others"], rows)


def lowest(policies: Sequence[str]) -> float:
    """How much more than by arithmetic a compiler asked for where that was most, of steps with one of these policies."""
    found = [1.0]
    for name, (run, index, where) in programs().items():
        said = KEPT.compiled(name)
        if said is not None and name in CHECKED and run.execution.remat in policies:
            found.append(said.needed / planning.stage_plan(run, index, topology(where)).held.total)
    return max(found)


def bytes_table() -> str:
    """Arithmetic against compilers."""
    rows = []
    for name, (run, index, where) in programs().items():
        known = KEPT.read().get(name)
        if known is None:
            continue
        plan = planning.stage_plan(run, index, topology(where))
        step = name if name in CHECKED else f"{name}, {style.tokens(plan.stage.seq_len)} on {where}"
        if "error" in known:
            rows.append([step, f"{plan.held.total / 1e9:.2f}", known["error"], ""])
            continue
        needed = known["needed"]
        rows.append([step, f"{plan.held.total / 1e9:.2f}", f"{needed / 1e9:.2f}", f"{plan.held.total / needed - 1:+.1%}"])
    return markdown(["step", "by arithmetic, GB", "as compiled, GB", "difference"], rows)


def published_table() -> str:
    """The roofline against published steps."""
    rows = []
    for row in ROWS:
        predicted = row.predicted()
        use = f"sets {' and '.join(name.replace('_', ' with ') for name in row.sets)}" if row.sets else "**test**"
        rows.append(
            [row.name, row.source, use, f"{row.seconds:.2f} s", f"{predicted:.2f} s", f"{predicted / row.seconds - 1:+.1%}"]
        )
    return markdown(["step", "source", "use", "published", "roofline", "difference"], rows)


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write() -> None:
    """Fill the page's template."""
    text = (HERE / "pods.template.md").read_text()
    for name, made in {
        "RECIPES": recipes_table, "LARGEST": largest_table, "BYTES": bytes_table, "PUBLISHED": published_table,
    }.items():  # fmt: skip
        text = text.replace(f"{{{name}}}", made())
    (HERE / "pods.md").write_text(text)


if __name__ == "__main__":
    flags = argparse.ArgumentParser()
    flags.add_argument("--compile", default="")
    asked = flags.parse_args().compile
    known = programs()
    names = {"": [], "all": list(known), "missing": [name for name in known if name not in KEPT.read()]}.get(
        asked, asked.split(",")
    )
    for name in names:
        KEPT.add(name, *known[name])
    write()
