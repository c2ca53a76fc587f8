"""The public names: a model trained, read, evaluated and asked in a few lines."""

import subprocess
import sys

import pytest

import lcx

CONFIG = "tests/cli/tiny.py"


def test_a_model_is_trained_read_evaluated_and_asked(tmp_path):
    workdir = tmp_path / "run"
    model = lcx.train(CONFIG, workdir, {"stages.longer.steps": 1, "mesh.fsdp": 1, "mesh.data": -1})
    assert (model.meta.stage, model.meta.step, model.meta.length) == ("longer", 3, 128)
    base = lcx.load(workdir, stage="base")
    assert base.meta.step == 2
    result = lcx.evaluate(base, lengths=(32, 64), positions=("yarn",), items=1, perplexity_tokens=256)
    assert result.select(task="perplexity").values("scheme") == ["none", "yarn"]
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
