"""The public names: a model trained, read, evaluated and asked in a few lines."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lcx
from lcx.evals.results import EvalResult

CONFIG = "tests/cli/tiny.py"


@pytest.mark.slow
def test_a_model_is_trained_read_evaluated_and_asked(tmp_path):
    workdir = tmp_path / "run"
    model = lcx.train(CONFIG, workdir, {"stages.longer.steps": 1, "mesh.fsdp": 1, "mesh.data": -1})
    assert (model.meta.stage, model.meta.step, model.meta.length) == ("longer", 3, 128)
    base = lcx.load(workdir, stage="base")
    assert base.meta.step == 2
    result = lcx.evaluate(base, lengths=(32, 64), positions=("yarn",), items=1, perplexity_tokens=256)
    assert result.select(task="perplexity").values("scheme") == ["none", "yarn"]
    figure = lcx.plot(result, task="perplexity")
    assert [line.get_xdata().tolist() for line in figure.axes[0].lines[:2]] == [[32, 64], [32, 64]]
    config = {"samples": 2, "prompt_format": "base"}
    result = lcx.evaluate(base, lengths=(1024,), tasks=("ruler_fwe",), questions=config)
    assert [(row.metric, row.n) for row in result.rows] == [("score", 2), ("empty", 2), ("fill", 2)]
    (completion,) = lcx.generate(base, ["import "], max_new_tokens=5)
    assert len(completion.tokens) == 5 and completion.ended == "length"


def test_schemes_and_theta():
    assert lcx.scheme("yarn:factor=16,original_length=256").factor == 16
    assert lcx.theta_report(8192, 5e5, 1048576, 128, with_lower_bound=False).critical_base > 5e5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lcx.train(CONFIG, "x", {"stages.lnger.steps": 1}), "no field 'lnger'; did you mean 'longer'"),
        (lambda: lcx.train("nowhere.py", "x"), "nowhere.py does not exist"),
        (lambda: lcx.load("nowhere"), "nowhere does not exist"),
        (lambda: lcx.generate(None, "text"), "prompts must be a list of texts"),
        (lambda: lcx.scheme("yarm"), "did you mean 'yarn'"),
        (lambda: lcx.extend("nowhere", 4096, "x"), "config.source='nowhere' is not a Hugging Face model"),
        (lambda: lcx.extend("nowhere", 4096, "x", stps=1), "no field 'stps'; did you mean 'steps'"),
        (lambda: lcx.load(CONFIG, dtype="bfloat"), "did you mean 'bfloat16'"),
        (lambda: lcx.plot(EvalResult("empty", 256)), "neither scores nor perplexity"),
        (lambda: lcx.plot([]), "no row has neither"),
    ],
)
def test_wrong_arguments_are_answered_in_a_sentence(call, message):
    with pytest.raises(lcx.UserError, match=message):
        call()


def test_importing_lcx_loads_nothing_heavy():
    code = "import sys, lcx; sys.exit(any(name in sys.modules for name in ('jax', 'numpy', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert "load" in dir(lcx) and lcx.__version__ == "0.1.0"
    with pytest.raises(AttributeError, match="no attribute 'lood'"):
        getattr(lcx, "lood")  # noqa: B009


@pytest.mark.parametrize("module", ["lcx.cli.main", "lcx.cli.parse", "lcx.cli.data_curate", "lcx.cli.data_prepare"])
def test_commands_without_a_model_load_no_jax(module):
    """Help, misspelled commands and what is done to text are answered before anything heavy is loaded."""
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_page_has_the_signatures():
    code = (Path(__file__).parents[1] / "docs/api.md").read_text().split("```")[1].removeprefix("python")
    lines = " ".join(code.split()).replace("( ", "(").replace(", )", ")").replace("lcx.", "\nlcx.")
    said = dict(re.findall(r"^lcx\.(\w+)(\(.*\)) -> ", lines, re.MULTILINE))
    for name, written in said.items():
        found = inspect.signature(getattr(lcx, name))
        bare = [one.replace(annotation=one.empty) for one in found.parameters.values()]
        assert written == str(inspect.Signature(bare)).replace("'", '"'), name
    assert {*said, "UserError"} == set(lcx.__all__)
