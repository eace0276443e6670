"""Further figures of the report: what experts are worth, and where they go."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gemoe_ds.analysis import drawing
from gemoe_ds.analysis.ablation import PREDICTORS, STEPS
from gemoe_ds.analysis.figures import Tokens, figure
from gemoe_ds.analysis.gains import MEASURES
from gemoe_ds.analysis.results import Results

SHOWN = {  # of the predictors: rules of routers, and their colours
    "rank": drawing.COLOURS["top_k"],
    "entropy_rank": drawing.COLOURS["gemoe"],
    "better": drawing.OTHERS[1],
    "ratio": drawing.OTHERS[2],
    "score": drawing.COLOURS["top_k_tuned"],
    "score_norm": drawing.OTHERS[0],
}

GAINS = LinearSegmentedColormap.from_list("gains", ["#0B3C5D", "#9CCBE8"])  # from the fewest on


@figure(
    "What leaving experts out puts at stake: pairs of a token and its expert, the smallest of a "
    "number first, and their share of the summed |change of the loss|, each left out alone. Lower "
    "is better: what is left out matters less. Dashed: a number that says nothing."
)
def dropped_expert_cost(results: Results, tokens: Tokens) -> Figure | None:
    if not results.ablations:
        return None
    drawn, grid = drawing.panels(len(results.ablations))
    drawn.set_size_inches(max(drawn.get_figwidth(), 6.4), drawn.get_figheight() + 1)
    share = np.linspace(0, 100, STEPS + 1)
    for axes, found in zip(grid, results.ablations, strict=True):
        axes.plot(share, share, color=drawing.FAINT, linestyle=drawing.DASHED, linewidth=1)
        named = {one.name: one for one in found.predictors}
        for name, colour in SHOWN.items():
            if name in named:
                curve = 100 * np.array(named[name].curve)
                axes.plot(share, curve, color=colour, label=PREDICTORS[name][0], linewidth=1.4)
        axes.set_title(results.label(found.method, found.k))
    handles, labels = grid[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=2)
    drawn.supxlabel("pairs that are left out (%)", fontsize=9)
    drawn.supylabel("share of all |cost| (%)", fontsize=9)
    return drawn


@figure(
    "What more experts bring, by how sure the gates are of a sample (the paper's Fig. 3): gain of "
    "accuracy over all questions, static routing, in groups of equally many samples. Bars: 95 %, "
    "over samples."
)
def gain_of_more_experts(results: Results, tokens: Tokens) -> Figure | None:
    if not results.gains:
        return None
    drawn = Figure(figsize=(8, 3.6), layout="constrained")
    grid = drawn.subplots(1, len(MEASURES), sharey=True)
    for axes, (by, name) in zip(grid, MEASURES.items(), strict=True):
        some = [gain for gain in results.gains if gain.by == by]
        for number, gain in enumerate(some):
            colour = GAINS(number / max(len(some) - 1, 1))
            value, height = [b.value for b in gain.bins], [b.gain for b in gain.bins]
            low = [b.gain - b.interval[0] for b in gain.bins]
            high = [b.interval[1] - b.gain for b in gain.bins]
            label = f"{gain.fewer} to {gain.more} experts"
            axes.plot(value, height, color=colour, marker="o", markersize=4, label=label)
            axes.errorbar(value, height, np.maximum([low, high], 0), fmt="none", ecolor=colour)
        axes.axhline(0, color=drawing.INK, linewidth=1)
        measure = name.format(k=results.meta.backbone_k)
        axes.set_xlabel(f"mean {measure} of the sample" + (" (bits)" if by == "entropy" else ""))
    grid[0].set_ylabel("gain of accuracy (points)")
    drawing.legend_above(drawn, grid[0])
    return drawn


@figure(
    "Where the experts go: mean number of experts by layer and kind of token, and by the place of "
    "a token in its answer, over all layers. Means over seeds."
)
def mean_k_by_token_kind(results: Results, tokens: Tokens) -> Figure | None:
    groups = [group for group in results.adaptive if group.token_kinds]
    if not groups:
        return None
    kinds = groups[0].token_kinds
    columns = len(kinds) + 1
    drawn = Figure(figsize=(2.3 * columns, 3), layout="constrained")
    grid = drawn.subplots(1, columns, sharey=True)
    for group in groups:
        look = {
            "color": drawing.colour_of(results, group.method),
            "linestyle": drawing.dashes_of(results, group.method),
            "marker": ".",
            "label": group.label,
        }
        for axes, kind in zip(grid, kinds, strict=False):
            table = [row.mean_k_by_token_kind.get(kind, ()) for row in group.rows]
            axes.plot(np.arange(1, len(table[0]) + 1), np.mean(table, axis=0), **look)
        places = min(len(row.mean_k_in_answer) for row in group.rows)
        in_answer = np.mean([row.mean_k_in_answer[:places] for row in group.rows], axis=0)
        grid[-1].plot(np.arange(1, len(in_answer) + 1), in_answer, **look)
    for axes, title in zip(grid, [*kinds, "along the answer"], strict=True):
        axes.set_title(title)
        axes.set_xlabel("token of the answer" if axes is grid[-1] else "MoE layer")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    grid[0].set_ylabel("experts a token")
    grid[0].set_ylim(bottom=0)
    drawing.legend_above(drawn, grid[0])
    return drawn
