"""The figures of the report: results and token samples -> matplotlib Figure, pure functions.

A new figure is one function under `@figure(caption)`; it returns None where it has nothing to show.
Shapes: L MoE layers, N tokens, K columns of a k histogram.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gemoe_ds.analysis import drawing
from gemoe_ds.analysis.record import Key, TokenSample
from gemoe_ds.analysis.results import BASELINE, FigureFile, Group, Results, Row

Tokens = Mapping[Key, TokenSample]  # by EvalRecord.key
Draw = Callable[[Results, Tokens], Figure | None]
FIGURES: dict[str, tuple[str, Draw]] = {}  # file stem -> caption, function
FEWEST = 10  # tokens of a bin whose mean is drawn


def figure(caption: str) -> Callable[[Draw], Draw]:
    """Register a function as a figure of the report, under the function's name."""

    def register(draw: Draw) -> Draw:
        FIGURES[draw.__name__] = (caption, draw)
        return draw

    return register


def write_figures(results: Results, tokens: Tokens, folder: Path) -> tuple[FigureFile, ...]:
    """Draw every figure that has something to show into `folder`, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with rc_context(drawing.STYLE):
        for name, (caption, draw) in FIGURES.items():
            drawn = draw(results, tokens)
            if drawn is not None:
                drawn.savefig(folder / f"{name}.png")
                written.append(FigureFile(file=f"{name}.png", caption=caption))
    return tuple(written)


def write_tensorboard(figures: tuple[FigureFile, ...], folder: Path, log_dir: Path) -> None:
    """Show the figures as images on TensorBoard."""
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and rarely wanted

    with SummaryWriter(str(log_dir)) as writer:
        for entry in figures:
            with Image.open(folder / entry.file) as image:
                pixels = np.asarray(image.convert("RGB"))
            writer.add_image(f"report/{Path(entry.file).stem}", pixels, dataformats="HWC")


@figure(
    "Accuracy against the mean number of experts a token: higher is better, further left is "
    "cheaper. Error bars: one standard deviation over seeds."
)
def accuracy_against_k(results: Results, tokens: Tokens) -> Figure | None:
    drawn = Figure(figsize=(6.4, 4), layout="constrained")
    axes = drawn.subplots()
    base = results.baseline
    level = 100 * base.mean(_accuracy)
    colour = drawing.colour_of(results, BASELINE)
    axes.axhline(level, color=colour, linewidth=1, linestyle=drawing.DASHED)
    axes.annotate(
        base.label,
        (0, level),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        color=colour,
        fontsize=8,
    )
    for method in dict.fromkeys(group.method for group in results.groups):
        groups = [group for group in results.groups if group.method == method]
        groups.sort(key=lambda group: -group.mean(_mean_k))
        k = [group.mean(_mean_k) for group in groups]
        accuracy = [100 * group.mean(_accuracy) for group in groups]
        sd = [100 * (group.sd(_accuracy) or 0) for group in groups]
        colour = drawing.colour_of(results, method)
        is_adaptive = groups[0].is_adaptive
        is_curve = method == BASELINE
        axes.plot(
            k,
            accuracy,
            color=colour,
            linestyle="-" if is_curve or (is_adaptive and len(groups) > 1) else "none",
            marker="*" if is_adaptive else "o" if is_curve else "s",
            markersize=14 if is_adaptive else 6.5,
            markerfacecolor=colour if is_adaptive or is_curve else "white",
            markeredgecolor="white" if is_adaptive or is_curve else colour,
            markeredgewidth=0.8 if is_adaptive or is_curve else 1.6,
            zorder=4 if is_adaptive else 3,
            label=groups[0].name if is_adaptive else drawing.family(method),
        )
        if any(sd):
            axes.errorbar(
                k, accuracy, yerr=sd, fmt="none", ecolor=drawing.INK, capsize=3, zorder=2.5
            )
    axes.set_xlabel("mean number of experts a token")
    axes.set_ylabel("accuracy, mean over kinds (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(x=0.06, y=0.1)
    drawing.legend_above(drawn, axes)
    return drawn


@figure(
    "Change of accuracy against the backbone's own k, by question kind. Error bars: one standard "
    "deviation over seeds."
)
def accuracy_by_kind(results: Results, tokens: Tokens) -> Figure | None:
    groups = _contenders(results)
    if not groups:
        return None
    kinds, base = results.kinds, results.baseline
    places = np.arange(len(kinds))
    width = min(0.8 / len(groups), 0.25)
    drawn = Figure(figsize=(max(6.4, 1.25 * len(kinds)), 3.8), layout="constrained")
    axes = drawn.subplots()
    colours = drawing.shades(results, groups)
    for number, (group, colour) in enumerate(zip(groups, colours, strict=True)):
        sd = [100 * (group.sd(_of(kind)) or 0) for kind in kinds]
        axes.bar(
            places + (number - (len(groups) - 1) / 2) * width,
            [100 * (group.mean(_of(kind)) - base.mean(_of(kind))) for kind in kinds],
            0.92 * width,
            yerr=sd if any(sd) else None,
            color=colour,
            error_kw={"elinewidth": 0.9, "ecolor": drawing.INK, "capsize": 2},
            label=group.label,
        )
    axes.axhline(0, color=drawing.INK, linewidth=1)
    axes.set_xticks(places, [f"{kind}\n{100 * base.mean(_of(kind)):.1f} %" for kind in kinds])
    axes.set_xlabel(f"question kind, and the accuracy of {base.label} on it")
    axes.set_ylabel(f"accuracy minus {base.label}'s (points)")
    axes.set_xlim(-0.6, len(kinds) - 0.4)
    axes.margins(y=0.08)
    axes.grid(False, axis="x")
    axes.tick_params(axis="x", length=0)
    drawing.legend_above(drawn, axes)
    return drawn


@figure(
    "Mean number of experts a token in every MoE layer (the paper's Fig. 5). Bands: one standard "
    "deviation over seeds."
)
def mean_k_per_layer(results: Results, tokens: Tokens) -> Figure | None:
    if not results.adaptive:
        return None
    num_layers = results.rows[0].num_layers
    layers = np.arange(1, num_layers + 1)
    drawn = Figure(figsize=(max(6.4, 0.3 * num_layers), 3.8), layout="constrained")
    axes = drawn.subplots()
    fixed: dict[int, list[Group]] = {}
    for group in results.one_each:
        if group.k is not None:
            fixed.setdefault(group.k, []).append(group)
    for k, groups in fixed.items():  # a fixed k is a level line: faint, named at its end
        is_base = k == results.meta.backbone_k
        axes.axhline(
            k,
            color=drawing.COLOURS[BASELINE] if is_base else drawing.FAINT,
            linewidth=1.5 if is_base else 1,
            linestyle="-" if is_base else drawing.DASHED,
        )
        axes.annotate(
            _level_name(k, groups),
            (1.01, k),
            xycoords=("axes fraction", "data"),
            va="center",
            color=drawing.COLOURS[BASELINE],
            fontsize=8,
            annotation_clip=False,
        )
    for group in results.adaptive:
        table = np.array([row.mean_k_per_layer for row in group.rows])
        mean = table.mean(0)
        colour = drawing.colour_of(results, group.method)
        axes.plot(layers, mean, color=colour, marker="o", label=group.label, zorder=3)
        if len(table) > 1:
            sd = table.std(0, ddof=1)
            axes.fill_between(layers, mean - sd, mean + sd, color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("MoE layer")
    axes.set_ylabel("mean number of experts a token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0.8, num_layers + 0.2)
    axes.set_ylim(0, 1.06 * max(max(row.mean_k_per_layer) for row in results.rows))
    axes.grid(False, axis="y")
    drawing.legend_above(drawn, axes)
    return drawn


@figure(
    "Gating entropy against the number of experts, layer by layer (the paper's Fig. 6). Grey: "
    "how many tokens of the first seed, darker is more, on a logarithmic scale. Line: mean k of "
    "the tokens of like entropy."
)
def entropy_against_k(results: Results, tokens: Tokens) -> Figure | None:
    chosen = _adaptive_panels(results, tokens)
    if not chosen:
        return None
    drawn, grid = drawing.panels(len(chosen))
    samples = [sample for _, sample, _ in chosen]
    highest = max(float(sample.entropy_LN.max(initial=0)) for sample in samples)
    lowest = min(float(sample.entropy_LN.min(initial=highest)) for sample in samples)
    edges = np.linspace(lowest, max(highest, lowest + 1e-3), 41)
    most = max(results.meta.backbone_k, *(int(sample.k_LN.max(initial=0)) for sample in samples))
    heights = np.arange(-0.5, most + 1)
    for axes, (group, sample, layer) in zip(grid, chosen, strict=True):
        entropy_N, k_N = sample.entropy_LN[layer], sample.k_LN[layer]
        drawing.density(axes, entropy_N, k_N, edges, heights)
        colour = drawing.colour_of(results, group.method)
        axes.plot(*binned_mean(entropy_N, k_N, edges), color=colour, linewidth=2.2)
        rho = group.rows[0].spearman_per_layer[layer]  # of all tokens, not only the sample
        says = "k is constant" if rho is None else f"Spearman {rho:.3f}"
        axes.text(0.04, 0.96, says, transform=axes.transAxes, va="top", fontsize=8)
        axes.set_title(_panel_title(results, group, layer))
        axes.set_ylim(0, 1.2 * most)
        axes.set_xlim(edges[0], edges[-1])
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    drawn.supxlabel("gating entropy (bits)", fontsize=9)
    drawn.supylabel("experts a token", fontsize=9)
    return drawn


@figure(
    "How often a token gets k experts, image and text tokens apart, layer by layer (first seed)."
)
def k_histogram(results: Results, tokens: Tokens) -> Figure | None:
    chosen = _adaptive_panels(results, tokens)
    if not chosen:
        return None
    drawn, grid = drawing.panels(len(chosen))
    shown_k: set[int] = set()
    for axes, (group, sample, layer) in zip(grid, chosen, strict=True):
        for name, colour, histogram_LK, shift in (
            ("image tokens", drawing.IMAGE, sample.k_hist_vision_LK, -0.2),
            ("text tokens", drawing.TEXT, sample.k_hist_text_LK, 0.2),
        ):
            counts_K = histogram_LK[layer]
            if not counts_K.sum():
                continue
            k_K = np.arange(counts_K.size)
            shown_k.update(k_K[counts_K > 0].tolist())
            axes.bar(k_K + shift, 100 * counts_K / counts_K.sum(), 0.38, color=colour, label=name)
            mean = (k_K * counts_K).sum() / counts_K.sum()
            axes.axvline(mean, color=colour, linewidth=1.2, linestyle=drawing.DASHED, zorder=0.5)
        axes.set_title(_panel_title(results, group, layer))
        axes.grid(False, axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True, min_n_ticks=1))
    grid[0].set_xlim(min(shown_k, default=0) - 0.6, max(shown_k, default=0) + 0.6)
    drawing.legend_above(drawn, grid[0])
    drawn.supxlabel("experts a token (dashed: the mean)", fontsize=9)
    drawn.supylabel("share of the tokens (%)", fontsize=9)
    return drawn


def binned_mean(
    x_N: np.ndarray, y_N: np.ndarray, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Middle and mean y of every bin of x that holds tokens enough."""
    bins_N = np.clip(np.digitize(x_N, edges) - 1, 0, edges.size - 2)
    counts = np.bincount(bins_N, minlength=edges.size - 1)
    sums = np.bincount(bins_N, weights=y_N, minlength=edges.size - 1)
    enough = counts >= FEWEST
    return ((edges[:-1] + edges[1:]) / 2)[enough], sums[enough] / counts[enough]


def _accuracy(row: Row) -> float:
    return row.accuracy


def _mean_k(row: Row) -> float:
    return row.mean_k


def _of(kind: str) -> Callable[[Row], float]:
    return lambda row: row.accuracy_by_kind[kind]


def _contenders(results: Results) -> list[Group]:
    """What is compared with the baseline: as they are, only the k nearest to the adaptive mean."""
    base_k = results.meta.backbone_k
    as_is = [g for g in results.groups if g.method == BASELINE and g.k != base_k]
    if results.adaptive and as_is:
        mean_k = results.adaptive[0].mean(_mean_k)
        as_is = [min(as_is, key=lambda group: abs(group.mean(_mean_k) - mean_k))]
    return as_is + [group for group in results.one_each if group.method != BASELINE]


def _level_name(k: int, groups: list[Group]) -> str:
    """All fixed-k methods with this k share a line; those that are not plain top-k are named."""
    families = [drawing.family(group.method) for group in groups if group.method != BASELINE]
    others = [name.removeprefix("Top-k, ") for name in families]
    if len(others) == len(groups):
        return f"Top-{k}, {' and '.join(others)}"
    return f"Top-{k}" + (f" (also {', '.join(others)})" if others else "")


def _adaptive_panels(results: Results, tokens: Tokens) -> list[tuple[Group, TokenSample, int]]:
    """One panel for every layer of every adaptive method, from its first seed."""
    return [
        (group, tokens[group.rows[0].key], layer)
        for group in results.adaptive
        for layer in range(group.rows[0].num_layers)
    ]


def _panel_title(results: Results, group: Group, layer: int) -> str:
    return (
        f"{group.label}, layer {layer + 1}" if len(results.adaptive) > 1 else f"Layer {layer + 1}"
    )
