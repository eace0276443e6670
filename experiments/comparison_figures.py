"""The comparison's figures: quality against mean k, and how the routers trained."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.comparison import TUNED, Comparison, mean_curve
from gemoe_ds.analysis import drawing
from gemoe_ds.analysis.results import BASELINE, FigureFile, Group, Row

MARKERS = "oDv^P<>Xsh"


def write_comparison_figures(comparison: Comparison, folder: Path) -> tuple[FigureFile, ...]:
    """Draw all of them into `folder`, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "pareto": (
            pareto(comparison),
            "Accuracy against the mean number of experts a token: static k, every method, one "
            "trained GeMoE held to other budgets, and GeMoE trained for each of them. Bars: one "
            "standard deviation over seeds.",
        ),
        "training": (
            training(comparison),
            "How the routers trained, means over seeds: cross-entropy of the answers, and mean k.",
        ),
    }
    with rc_context(drawing.STYLE):
        for name, (figure, _) in drawn.items():
            figure.savefig(folder / f"{name}.png")
    return tuple(FigureFile(file=f"{n}.png", caption=caption) for n, (_, caption) in drawn.items())


def pareto(comparison: Comparison) -> Figure:
    with rc_context(drawing.STYLE):
        figure = Figure(figsize=(7.2, 4.8), layout="constrained")
        axes = figure.subplots()
        _line(axes, comparison.static, drawing.COLOURS[BASELINE], "static k, as it is", "o-")
        tuned = comparison.of(TUNED)
        _line(axes, tuned, drawing.COLOURS[TUNED], "static k, tuned", "s")
        gemoe = drawing.COLOURS["gemoe"]
        _line(axes, comparison.budget_groups, gemoe, "GeMoE held to a budget", ".--")
        trained = [group for _, group in comparison.budgeted]
        _line(axes, trained, gemoe, "GeMoE trained for a budget", "p:", size=5)
        others = [g for g in comparison.methods if g.method not in (TUNED, "gemoe")]
        for group, marker in zip(others, MARKERS, strict=False):
            colour = drawing.colour_of(comparison.results, group.method)
            _line(axes, [group], colour, group.label, marker)
        _line(axes, comparison.of("gemoe"), gemoe, "GeMoE", "*", size=15)
        axes.set_xlabel("mean number of experts a token")
        axes.set_ylabel("accuracy, mean over kinds (%)")
        drawing.legend_above(figure, axes)
    return figure


def _line(
    axes: Axes, groups: list[Group], colour: str, label: str, style: str, size: float = 7
) -> None:
    if groups:
        axes.errorbar(
            [group.mean(_mean_k) for group in groups],
            [100 * group.mean(_accuracy) for group in groups],
            yerr=[100 * (group.sd(_accuracy) or 0) for group in groups],
            fmt=style,
            color=colour,
            markersize=size,
            capsize=2,
            elinewidth=0.9,
            label=label,
        )


def training(comparison: Comparison) -> Figure:
    with rc_context(drawing.STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        grid = figure.subplots(1, 2)
        for group in comparison.methods:
            of_group = [c for c in comparison.curves if (c.method, c.k) == (group.method, group.k)]
            if not of_group:
                continue
            colour = drawing.colour_of(comparison.results, group.method)
            dashes = drawing.dashes_of(comparison.results, group.method)
            if group.method == TUNED and group.k != group.rows[0].backbone_k:
                dashes = drawing.DASHED
            for axes, values in zip(grid, ("loss_S", "mean_k_S"), strict=True):
                steps, means = mean_curve(of_group, values)
                axes.plot(
                    steps, means, linestyle=dashes, color=colour, linewidth=1.4, label=group.label
                )
        for axes, name in zip(grid, ("cross-entropy of the answers", "mean k"), strict=True):
            axes.set_xlabel("step")
            axes.set_ylabel(name)
        drawing.legend_above(figure, grid[0])
    return figure


def _accuracy(row: Row) -> float:
    return row.accuracy


def _mean_k(row: Row) -> float:
    return row.mean_k
