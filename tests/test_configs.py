"""Every config loads, resolves and divides over the chips that it names; in a slow test its steps compile for them."""

import ast
import re
import runpy
from pathlib import Path

import pytest

from lcx.cli import parse
from lcx.core.numbers import duration
from lcx.planning import plan as planning
from lcx.planning.topology import topology
from lcx.recipes.recipe import recipe

ROOT = Path(__file__).parents[1] / "configs"
NO_RUN = {"pods/base.py", "data/long_mixture.py"} | {
    str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if re.search(r"^(def )?complete\b", path.read_text(), re.MULTILINE)
}
"""Shared parts, curation, and configs that are completed from a model's folder; their own tests load them."""

CONFIGS = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if str(path.relative_to(ROOT)) not in NO_RUN)
PODS = [name for name in CONFIGS if name.startswith("pods/")]


def resolved(name):
    """The run of a config and the chips that it is for: those that it names, or else a machine with CPUs."""
    path = ROOT / name
    return recipe(parse.load(str(path))).run, topology(runpy.run_path(str(path)).get("TOPOLOGY", "cpu:1"))


def test_all_recipes_are_there():
    assert {name.split("/")[-1].split("_")[0] for name in PODS} == {"llama3", "lwm", "prolong", "yarn", "qwen25", "smollm2"}


@pytest.mark.parametrize("name", [str(path.relative_to(ROOT)) for path in sorted(ROOT.rglob("*.py"))])
def test_says_what_it_is_for(name):
    text = ast.get_docstring(ast.parse((ROOT / name).read_text()))
    if name == "pods/base.py":
        return
    heads = ["Command:", "Hardware:", "Time:", "Result:"] + ["Source:"] * name.startswith("pods/")
    assert all(f"\n{head}" in text for head in heads), text


@pytest.mark.parametrize("name", CONFIGS)
def test_resolves_and_divides(name):
    run, where = resolved(name)
    plans = [planning.stage_plan(run, index, where) for index in range(len(run.stages))]
    assert all(one.time.seconds > 0 and one.held.total > 0 for one in plans)
    if name in PODS:
        assert all(one.fits for one in plans), [planning.sentence(one) for one in plans]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_compiles_for_its_chips(name):
    run, where = resolved(name)
    found = planning.compiled_plan(run, planning.fullest(run, where), where)
    assert found.fits, planning.sentence(found)


@pytest.mark.parametrize("name", PODS)
def test_its_time_is_that_of_its_plan(name):
    run, where = resolved(name)
    total = planning.totals([planning.stage_plan(run, index, where) for index in range(len(run.stages))])
    said = next(line for line in (ROOT / name).read_text().splitlines() if line.startswith("Time:"))
    assert f" {duration(3600 * total['hours'])} by `lcx plan`" in said, (said, total)
