"""What `lcx plan` prints."""

import json
from pathlib import Path

import pytest

from lcx.cli.main import main
from lcx.cli.plan import parse_changes
from lcx.planning import compile as compiling
from tests.cli.command import CONFIG
from tests.report.html_page import Page

POD = Path(__file__).parents[2] / "configs" / "pods" / "llama3_8b_4m.py"


def plan(capsys, *words, config=POD):
    main(["plan", f"--config={config}", "--nocompile", *words])
    return capsys.readouterr().out


def test_a_plan_in_words(capsys, tmp_path):
    said = plan(capsys, f"--html={tmp_path / 'page' / 'plan.html'}", "--what_if=execution.remat=offload,mesh.ulysses=4")
    assert "stages.to_4m: a step of 4,194,304 tokens a row needs" in said and "by arithmetic: it fits" in said
    assert "chip-hours for 1,623,195,648 tokens on v5p:4x4x4" in said and "as it is" in said
    assert all(part in said for part in ("parameters", "optimizer", "gradients", "saved inputs", "to_64k", "to_1m"))
    sections = Page((tmp_path / "page" / "plan.html").read_text()).sections
    assert [sections[name].images for name in ("Memory by context", "A step")] == [["memory by context"], ["a step as a timeline"]]
    assert [row[0] for row in sections["Stages"].tables[0][1:]] == ["to_64k", "to_256k", "to_512k", "to_1m", "to_4m"]


def test_a_plan_as_json_that_does_not_fit(capsys):
    found = json.loads(plan(capsys, "--json", "--topology=v5e:8x8", "--stage=to_4m"))
    assert found["topology"] == "v5e:8x8" and not found["stages"][-1]["fits"]
    assert found["total"]["hours"] == pytest.approx(sum(stage["hours"] for stage in found["stages"]))
    assert found["advice"] and all(way["fits"] == "yes" for way in found["advice"])


@pytest.mark.parametrize("wanted", ["context", "remat"])
def test_what_is_looked_for(capsys, wanted):
    found = json.loads(plan(capsys, "--json", f"--find={wanted}", "--stage=to_1m"))["find"]
    assert found[0]["fits"] == "yes" and len(found) > 1


def test_gpus_are_planned_by_arithmetic(capsys):
    assert json.loads(plan(capsys, "--json", "--topology=h100:64"))["stages"][0]["step"]["seconds"] > 0


def test_a_config_without_chips_is_for_this_machine(capsys):
    assert "of cpu:1, by arithmetic: it fits" in plan(capsys, config=CONFIG)


def test_changes_are_values_or_words():
    found = parse_changes("execution.remat=offload, mesh.ulysses=4,stages.a.max_position=None")
    assert found == {"execution.remat": "offload", "mesh.ulysses": 4, "stages.a.max_position": None}


def test_without_libtpu_it_is_arithmetic_and_that_is_said(capsys, monkeypatch):
    monkeypatch.setattr(compiling, "_find_libtpu", lambda: None)
    main(["plan", f"--config={POD}"])
    said = capsys.readouterr()
    assert "by arithmetic: it fits" in said.out and "nothing is compiled and bytes are by arithmetic" in said.err.replace("\n", " ")
    with pytest.raises(SystemExit):
        main(["plan", f"--config={POD}", "--compile"])
    assert "needs libtpu, which is not installed" in capsys.readouterr().err
