"""The contest's figures: the fronts, and differences at the same mean k."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from experiments.compare.answers import Contest, Measured
from experiments.compare.standings import Standings
from gemoe_ds.analysis import drawing
from gemoe_ds.analysis.paired import Estimate

MARKERS = "ovs^D<>PXph"
LEAST, MOST = 2.2, 8.2  # mean k that is drawn


def write_figures(contest: Contest, main: Standings, folder: Path) -> dict[str, str]:
    """PNG files in `folder`; their captions by name."""
    folder.mkdir(parents=True, exist_ok=True)
    ours = contest.grid.rows[contest.grid.ours].label
    drawn = {
        "fronts": (
            fronts(contest, main),
            "Accuracy against the mean number of experts a token, means over router seeds. Bars: "
            "95 % intervals at the compared mean k.",
        ),
        "differences": (
            differences(contest, main),
            f"Difference to {ours} at the same mean k, in points, with 95 % intervals.",
        ),
    }
    with rc_context(drawing.STYLE):
        for name, (figure, _) in drawn.items():
            figure.savefig(folder / f"{name}.png")
    return {name: caption for name, (_, caption) in drawn.items()}


def fronts(contest: Contest, main: Standings) -> Figure:
    with rc_context(drawing.STYLE):
        figure = Figure(figsize=(8, 6), layout="constrained")
        axes = figure.subplots()
        for name in main.rows():
            points = [
                (
                    statistics.fmean(m.mean_k for m in same),
                    statistics.fmean(m.accuracy for m in same),
                )
                for same in _by_point(contest, main, name)
            ]
            look = _look(contest, name)
            points = sorted(p for p in points if LEAST <= p[0] <= MOST)
            axes.plot(
                [k for k, _ in points],
                [100 * accuracy for _, accuracy in points],
                label=contest.grid.rows[name].label,
                **look,
            )
            at = {k: s.accuracy for (row, k), s in main.at.items() if row == name}
            _bars(axes, [*at], [*at.values()], look["color"])
        axes.set_xlabel("mean number of experts a token")
        axes.set_ylabel("accuracy, mean over kinds (%)")
        _legend(figure, axes)
    return figure


def differences(contest: Contest, main: Standings) -> Figure:
    with rc_context(drawing.STYLE):
        ks = sorted({k for _, k in main.at})
        rows = [
            r for r in main.rows() if any(main.at[r, k].to_ours for k in ks if (r, k) in main.at)
        ]
        figure = Figure(figsize=(9, 1.2 + 0.26 * max(len(rows), 4)), layout="constrained")
        panels = figure.subplots(1, max(len(ks), 1), sharey=True, squeeze=False)[0]
        for axes, k in zip(panels, ks, strict=False):
            axes.axvline(0, color=drawing.INK, linewidth=0.8)
            axes.set_title(f"k {k:g}")
            for place, name in enumerate(rows):
                standing = main.get(name, k)
                if standing and (found := standing.to_ours):
                    _bars(axes, [place], [found], _look(contest, name)["color"], upright=False)
        panels[0].set_yticks(range(len(rows)), [contest.grid.rows[name].label for name in rows])
        panels[0].invert_yaxis()
    return figure


def _by_point(contest: Contest, main: Standings, name: str) -> list[list[Measured]]:
    """The seeds of each value of the knob or dial."""
    found: dict[tuple[str, float | None], list[Measured]] = {}
    for m in contest.measured:
        trained_alike = m.training == main.training or m.seed is None
        if m.row == name and m.backbone == main.backbone and trained_alike:
            found.setdefault((str(m.value), m.budget), []).append(m)
    return list(found.values())


def _bars(
    axes: Any, places: list[float], found: list[Estimate], colour: str, *, upright: bool = True
) -> None:
    values = [100 * e.value for e in found]
    ends = [[100 * (e.value - e.low) for e in found], [100 * (e.high - e.value) for e in found]]
    bars = {"fmt": "." if not upright else "none", "color": colour, "capsize": 2, "elinewidth": 1}
    if upright:
        axes.errorbar(places, values, yerr=ends, **bars)
    else:
        axes.errorbar(values, places, xerr=ends, **bars)


def _look(contest: Contest, name: str) -> dict[str, Any]:
    """Ours and the reference stand out; the others differ in colour and marker."""
    grid = contest.grid
    if name in (grid.ours, grid.reference):
        colour = drawing.COLOURS["gemoe"] if name == grid.ours else drawing.COLOURS["top_k_tuned"]
        return {"color": colour, "marker": "*", "linewidth": 2.4, "markersize": 9, "zorder": 5}
    turn = [row for row in grid.rows if row not in (grid.ours, grid.reference)].index(name)
    colour = (*drawing.OTHERS, drawing.INK)[turn % (len(drawing.OTHERS) + 1)]
    marker = MARKERS[turn % len(MARKERS)]
    return {"color": colour, "marker": marker, "linewidth": 1, "markersize": 4}


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
