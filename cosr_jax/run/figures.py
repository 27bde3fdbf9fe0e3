"""Two pictures of a run: the mastery heat map and the learning curves, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def mastery_heatmap(mastery: Mapping[str, float]) -> bytes:
    """Skills x levels, coloured from 0 to 1 and labelled; cells without a value stay blank.

    Args:
      mastery: {"skill/level": rate in [0, 1]}, at least one cell.
    """
    skills = sorted({cell.rpartition("/")[0] for cell in mastery})
    levels = sorted({int(cell.rpartition("/")[2]) for cell in mastery})
    grid = np.full((len(skills), len(levels)), np.nan)
    for cell, rate in mastery.items():
        skill, _, level = cell.rpartition("/")
        grid[skills.index(skill), levels.index(int(level))] = rate
    figure, axes = _figure(width=2.6 + 0.8 * len(levels), height=1.2 + 0.4 * len(skills))
    picture = axes.imshow(grid, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(levels)), [str(level) for level in levels])
    axes.set_yticks(range(len(skills)), skills)
    axes.set_xlabel("level")
    for row, column in np.argwhere(np.isfinite(grid)):
        rate = grid[row, column]
        colour = "black" if rate > 0.6 else "white"
        axes.text(column, row, f"{rate:.2f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(picture, ax=axes, label="pass rate")
    return _png(figure)


def learning_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> bytes:
    """One line per named curve.

    Args:
      curves: {name: [(optimizer step, share in [0, 1]), ...]}, at least one curve.
    """
    figure, axes = _figure(width=6.4, height=3.6)
    for name, points in curves.items():
        steps, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(steps, values, marker="o", markersize=3, label=name)
    axes.set_xlabel("optimizer step")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _png(figure)


def _figure(width: float, height: float):
    # The object-oriented interface keeps no global state, unlike pyplot, and needs no display.
    # Imported here: it takes half a second that commands without figures need not wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    return figure, figure.add_subplot()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
