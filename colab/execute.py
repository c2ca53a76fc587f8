"""Run notebooks from top to bottom and keep their outputs.

Command:  python colab/execute.py            (all of them; on 2 CPU cores four minutes, and 20 for the real model)
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
NOTEBOOKS = ("explore_positions.ipynb", "extend_a_tiny_model.ipynb", "extend_a_real_model.ipynb")


def execute(path: Path, environment: Mapping[str, str], probe: str | None = None, timeout: int = 3600) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel of this Python; `probe` is the code of one more cell at its end.

    `environment` is all that the kernel gets. Raises `nbclient.exceptions.CellExecutionError` with the cell that failed.
    """
    notebook = nbformat.read(path, as_version=4)
    if probe is not None:
        notebook.cells.append(nbformat.v4.new_code_cell(probe))
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", record_timing=False, resources={})
    client.execute(env=dict(environment), cwd=str(path.parent))
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    return notebook


def main() -> None:
    """Execute the notebooks that are named, or all, in place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", default=NOTEBOOKS)
    for name in parser.parse_args().notebooks:
        path = HERE / Path(name).name
        nbformat.write(execute(path, os.environ), path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
