"""The figures of the paper's text and Appendix C, of what was measured: pure functions.

A new figure is one function under `@figure`: it takes a `Model` and gives (name, caption, Figure)
for all that it has to show. Shapes: L MoE layers, N tokens, D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gemoe_ds.analysis import drawing
from gemoe_ds.analysis.benchmarks.collect import ModeRun
from gemoe_ds.analysis.benchmarks.columns import Column
from gemoe_ds.analysis.benchmarks.groups import Group, Model
from gemoe_ds.analysis.benchmarks.tables import LAYOUTS
from gemoe_ds.analysis.figures import binned_mean
from gemoe_ds.analysis.gains import gains_of
from gemoe_ds.analysis.questions import Questions
from gemoe_ds.analysis.results import BASELINE, FigureFile
from gemoe_ds.analysis.samples import Samples

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Gates = Mapping[str, np.ndarray]  # how it came about -> gate_LED; see cli/benchmark/tables.py
Drawn = tuple[str, str, Figure]  # file stem, caption, figure
Draw = Callable[[Model, Gates], Iterable[Drawn]]
FIGURES: list[Draw] = []
TABLES = {layout.number: layout.columns for layout in LAYOUTS if layout.number != "2"}
_MOST_LAYERS = 4  # of figures with a panel a layer; of 16 layers the paper's: 4, 8, 12 and 16


def figure(draw: Draw) -> Draw:
    FIGURES.append(draw)
    return draw


def draw_all(models: Sequence[Model], gates: Gates) -> Iterator[Drawn]:
    """Every figure that has something to show; of several models, each by itself."""
    for number, model in enumerate(models, 1):
        for draw in FIGURES:
            for name, caption, drawn in draw(model, gates if len(models) == 1 else {}):
                if len(models) > 1:
                    name, caption = f"{name}_model_{number}", f"{model.title}: {caption}"
                yield name, caption, drawn


def write_figures(
    models: Sequence[Model], gates: Gates, folder: Path, board: SummaryWriter | None = None
) -> tuple[FigureFile, ...]:
    """As PNG into `folder`, and on TensorBoard."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with rc_context(drawing.STYLE):
        for name, caption, drawn in draw_all(models, gates):
            drawn.savefig(folder / f"{name}.png")
            written.append(FigureFile(file=f"{name}.png", caption=caption))
            if board:
                board.add_figure(f"benchmarks/{name}", drawn)
    return tuple(written)


@figure
def mean_k_per_layer(model: Model, gates: Gates) -> Iterable[Drawn]:
    groups = shown_groups(model)
    for number, columns in TABLES.items():
        ran = [c for c in model.ran(columns) if any(model.is_whole(g, c) for g in groups)]
        if not ran:
            continue
        drawn, grid = drawing.panels(len(ran))
        for axes, column in zip(grid, ran, strict=True):
            axes.axhline(backbone_k(model), color=drawing.COLOURS[BASELINE], linewidth=1.2)
            for group in (group for group in groups if model.is_whole(group, column)):
                table = np.array([run.routing[column.heading].mean_k_L for run in group.runs])
                layers, mean_L = np.arange(1, table.shape[1] + 1), table.mean(0)
                colour = colour_of(model, group)
                axes.plot(layers, mean_L, color=colour, marker=".", label=group.label)
                if len(table) > 1:
                    sd_L = table.std(0, ddof=1)
                    axes.fill_between(
                        layers, mean_L - sd_L, mean_L + sd_L, color=colour, alpha=0.2, linewidth=0
                    )
            axes.set_title(column.heading)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        drawn.supxlabel("MoE layer", fontsize=9)
        drawn.supylabel("experts a token", fontsize=9)
        drawing.legend_above(drawn, grid[0])
        caption = (
            "Mean number of experts a token in every MoE layer, on the benchmarks of Table "
            f"{number} (the paper's Figs. 5 and 8). Line across: the backbone's own k. Bands: one "
            "standard deviation over seeds."
        )
        yield f"mean_k_per_layer_table_{number}", caption, drawn


@figure
def entropy_against_k(model: Model, gates: Gates) -> Iterable[Drawn]:
    for group in shown_groups(model):
        for number, columns in TABLES.items():
            ran = [c for c in model.ran(columns) if model.is_whole(group, c)]
            if ran:
                caption = (
                    f"Gating entropy against the number of experts that {group.label} gives, on "
                    f"the benchmarks of Table {number} (the paper's Figs. 6 and 9; first seed). "
                    "Grey: tokens of the sample, darker is more. Line: mean k of like entropy. "
                    "Spearman's correlation is of all tokens."
                )
                drawn = _entropy_panels(model, group, ran)
                yield f"entropy_against_k_{file_name(group)}_table_{number}", caption, drawn


def _entropy_panels(model: Model, group: Group, columns: Sequence[Column]) -> Figure:
    layers = some_layers(group.first)
    size = (2.3 * max(len(layers), 2), 1.9 * len(columns) + 0.6)
    drawn = Figure(figsize=size, layout="constrained")
    grid = drawn.subplots(len(columns), len(layers), sharex=True, sharey=True, squeeze=False)
    sums = {column.heading: group.first.routing[column.heading] for column in columns}
    every = np.concatenate([one.entropy_LN[layers].ravel() for one in sums.values()])
    edges = np.linspace(every.min(), max(every.max(), every.min() + 1e-3), 41)
    most = max(backbone_k(model), *(int(one.k_LN.max(initial=0)) for one in sums.values()))
    heights = np.arange(-0.5, most + 1)
    for line, (heading, one) in zip(grid, sums.items(), strict=True):
        for axes, layer in zip(line, layers, strict=True):
            entropy_N, k_N = one.entropy_LN[layer], one.k_LN[layer]
            drawing.density(axes, entropy_N, k_N, edges, heights)
            axes.plot(*binned_mean(entropy_N, k_N, edges), color=colour_of(model, group))
            rho = one.spearman_L[layer]
            says = "k is constant" if rho is None else f"Spearman {rho:.3f}"
            axes.text(0.04, 0.96, says, transform=axes.transAxes, va="top", fontsize=8)
            axes.set_ylim(0, 1.2 * most)
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.set_title(f"{heading}, layer {layer + 1}")
    drawn.supxlabel("gating entropy (bits)", fontsize=9)
    drawn.supylabel("experts a token", fontsize=9)
    return drawn


@figure
def gain_of_more_experts(model: Model, gates: Gates) -> Iterable[Drawn]:
    base = model.baseline
    columns = [column for group in TABLES.values() for column in group]
    found = {column.heading: _gains(model, column) for column in model.ran(columns)}
    found = {heading: gains for heading, gains in found.items() if gains}
    if not base or not found:
        return
    drawn, grid = drawing.panels(len(found))
    for axes, (heading, gains) in zip(grid, found.items(), strict=True):
        for number, gain in enumerate(gains):
            colour = drawing.OTHERS[number % len(drawing.OTHERS)]
            value, height = [b.value for b in gain.bins], [b.gain for b in gain.bins]
            ends = np.array([b.interval for b in gain.bins]).T
            label = f"{gain.fewer} to {gain.more} experts"
            axes.plot(value, height, color=colour, marker="o", markersize=3, label=label)
            bars = np.maximum([height - ends[0], ends[1] - height], 0)
            axes.errorbar(value, height, bars, fmt="none", ecolor=colour, elinewidth=0.8)
        axes.axhline(0, color=drawing.INK, linewidth=1)
        axes.set_title(heading)
    drawn.supxlabel("mean gating entropy of the document (bits)", fontsize=9)
    drawn.supylabel("gain (points)", fontsize=9)
    drawing.legend_above(drawn, grid[0])
    caption = (
        "What more experts bring, by the gating entropy of a document (the paper's Fig. 3): static "
        "k of the untouched model, documents in groups of equally many. Bars: 95 %, by document."
    )
    yield "gain_of_more_experts", caption, drawn


def _gains(model: Model, column: Column) -> tuple:
    """From every smaller static k to the backbone's own; none where scores are not by document."""
    static = {
        group.first.mode.k: group.first
        for group in model.groups
        if group.first.mode.method == BASELINE and model.is_whole(group, column)
    }
    own = backbone_k(model)
    right = {k: run.right(column) for k, run in static.items() if k is not None}
    known = {k: right_N / 100 for k, right_N in right.items() if right_N is not None}
    if column.parts or own not in known:
        return ()
    entropy_D = document_entropy(static[own], column)
    rows_D = np.flatnonzero(np.isfinite(entropy_D))
    zeros, names = np.zeros(rows_D.size, np.int16), np.array([column.heading])
    questions = {
        k: Questions(rows_D.astype(np.int32), zeros, zeros, names, right_N[rows_D])
        for k, right_N in known.items()
    }
    entropies = entropy_D[rows_D]
    samples = Samples(rows_D.astype(np.int32), entropies, np.zeros_like(entropies))
    return gains_of(questions, samples, own, ["entropy"]) if rows_D.size else ()


def document_entropy(run: ModeRun, column: Column) -> np.ndarray:
    """Of every document, in the order of `ModeRun.right`; NaN where none of its tokens counted."""
    routing, parts = run.routing[column.heading], run.columns[column.heading]
    return np.concatenate(
        [routing.entropy_of(part.folder.name, part.documents.doc_id_N) for part in parts]
    )


def shown_groups(model: Model) -> list[Group]:
    """What picks k, each method once: as trained, else at the largest of its budgets."""
    found: dict[str, Group] = {}
    for group in model.groups:
        if group.is_adaptive:
            found.setdefault(group.first.mode.method, group)
    return list(found.values())


def colour_of(model: Model, group: Group) -> str:
    """The same for a method in every figure."""
    method = group.first.mode.method
    others = sorted({g.first.mode.method for g in model.groups} - set(drawing.COLOURS))
    return drawing.COLOURS.get(method) or drawing.OTHERS[others.index(method) % len(drawing.OTHERS)]


def backbone_k(model: Model) -> int:
    return model.groups[0].first.mode.backbone_k


def some_layers(run: ModeRun) -> list[int]:
    """Evenly spaced, the last one among them."""
    number = run.mode.num_layers
    steps = np.linspace(number / _MOST_LAYERS, number, _MOST_LAYERS)
    return sorted({max(int(np.rint(step)), 1) - 1 for step in steps})


def file_name(group: Group) -> str:
    mode = group.first.mode
    k = "" if mode.k is None else f"_{mode.k}"
    return f"{mode.method}{k}"


def heat(axes: Axes, values: np.ndarray, title: str, **look: object) -> object:
    """A field of colour without grid lines, its first row on top."""
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **look)  # type: ignore[arg-type]
    axes.grid(False)
    axes.set_title(title)
    return image
