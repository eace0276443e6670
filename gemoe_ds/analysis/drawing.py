"""How the figures look: one colour a method, quiet axes, legends that hide nothing."""

from __future__ import annotations

import colorsys
import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_rgb
from matplotlib.figure import Figure

from gemoe_ds.analysis.results import Group, Results

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {"top_k": "#595959", "top_k_tuned": "#0072B2", "gemoe": "#D55E00"}
OTHERS = (
    "#56B4E9",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#F0E442",
)  # further methods, in the order of their names
IMAGE, TEXT = "#009E73", "#CC79A7"
INK, FAINT = "#404040", "#BFBFBF"
GREYS = LinearSegmentedColormap.from_list("greys", ["#E9E9E9", "#6E6E6E"])
DASHED = (0, (4, 3))
DASHES = ((0, ()), (0, (5, 2)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)))  # in turn, as colours return
STYLE: Any = {  # matplotlib's rc parameters
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#808080",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
}


def colour_of(results: Results, method: str) -> str:
    """The same for a method in every figure; beyond eight methods see `dashes_of`."""
    return COLOURS.get(method) or OTHERS[_turn(results, method) % len(OTHERS)]


def dashes_of(results: Results, method: str) -> tuple[int, tuple[float, ...]]:
    """The line style that tells methods of one colour apart."""
    if method in COLOURS:
        return DASHES[0]
    return DASHES[_turn(results, method) // len(OTHERS) % len(DASHES)]


def _turn(results: Results, method: str) -> int:
    """Its place among the methods that have no colour of their own."""
    return sorted({group.method for group in results.groups} - set(COLOURS)).index(method)


def family(method: str) -> str:
    """A fixed-k method whatever its k."""
    return {"top_k": "Top-k", "top_k_tuned": "Top-k, tuned"}.get(method, method)


def shades(results: Results, groups: list[Group]) -> list[tuple[float, float, float]]:
    """The colours of `groups`; of a method that occurs with several k, smaller ones are lighter."""
    tones = []
    for group in groups:
        of_method = [other.k for other in groups if other.method == group.method]
        step = 0.9 * of_method.index(group.k) / len(of_method)
        hue, light, saturation = colorsys.rgb_to_hls(*to_rgb(colour_of(results, group.method)))
        tones.append(colorsys.hls_to_rgb(hue, light + (0.9 - light) * step, saturation))
    return tones


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """Small panels on common scales, at most four side by side."""
    columns = min(4, count)
    rows = math.ceil(count / columns)
    drawn = Figure(figsize=(max(2.3 * columns, 4.6), 2.2 * rows + 0.5), layout="constrained")
    grid = drawn.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for number, spare in enumerate(grid[count:], count):
        spare.remove()
        grid[number - columns].tick_params(labelbottom=True)  # now the lowest of its column
    return drawn, list(grid[:count])


def density(
    axes: Axes, x_N: np.ndarray, y_N: np.ndarray, x_edges: np.ndarray, y_edges: np.ndarray
) -> None:
    """How many points fall into each cell, in greys; nothing where there is none."""
    counts, _, _ = np.histogram2d(x_N, y_N, bins=[x_edges, y_edges])
    axes.pcolormesh(
        x_edges,
        y_edges,
        np.ma.masked_equal(counts.T, 0),
        cmap=GREYS,
        norm=LogNorm(1, max(counts.max(), 2)),
    )


def legend_above(drawn: Figure, axes: Axes) -> None:
    """A legend outside of the axes."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        drawn.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 5))
