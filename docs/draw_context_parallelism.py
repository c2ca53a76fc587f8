"""The drawing of docs/context_parallelism.md: who computes what under each layout, from the layouts' own code.

python docs/draw_context_parallelism.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.colors
import numpy as np

from lcx.attention.parallel.sequence_layout import SEQUENCE_LAYOUTS, arrange
from lcx.report import style

TOKENS, DEVICES = 32, 4
LAYOUTS = [layout for layout in SEQUENCE_LAYOUTS if layout != "balanced"]
"""Those that do not depend on the documents of a row."""


@style.typography()
def draw(path: Path) -> None:
    """A causal score matrix under each layout: the colour is the device that computes a query's row."""
    figure = style.new_figure(11.0, 4.1)
    colours = matplotlib.colors.ListedColormap([style.PAPER, *style.LINES[:DEVICES]])
    for axes, layout in zip(figure.subplots(1, len(LAYOUTS)), LAYOUTS, strict=True):
        dealt = arrange(np.arange(TOKENS)[None], layout, DEVICES)[0].reshape(DEVICES, -1)
        owner = np.empty(TOKENS, int)
        for device, held in enumerate(dealt):
            owner[held] = device
        seen = np.tril(np.ones((TOKENS, TOKENS), bool))
        axes.imshow(np.where(seen, owner[:, None] + 1, 0), cmap=colours, vmin=0, vmax=DEVICES, interpolation="nearest")
        work = [seen[held].sum() / seen.sum() for held in dealt]
        axes.set_title(layout)
        axes.set_xlabel("work of each device: " + ", ".join(f"{share:.0%}" for share in work))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    style.save(figure, path)


if __name__ == "__main__":
    draw(Path(__file__).parent / "images" / "context_parallelism.png")
