"""Further figures of the report: what experts are worth, and where they go."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from gemoe_ds.analysis import drawing
from gemoe_ds.analysis.ablation import PREDICTORS, STEPS
from gemoe_ds.analysis.figures import Tokens, figure
from gemoe_ds.analysis.results import Results

SHOWN = {  # of the predictors: rules of routers, and their colours
    "rank": drawing.COLOURS["top_k"],
    "entropy_rank": drawing.COLOURS["gemoe"],
    "better": drawing.OTHERS[1],
    "ratio": drawing.OTHERS[2],
    "score": drawing.COLOURS["top_k_tuned"],
    "score_norm": drawing.OTHERS[0],
}


@figure(
    "What leaving experts out puts at stake: pairs of a token and its expert, the smallest of a "
    "number first, and their share of the summed |change of the loss|, each left out alone. Lower "
    "is better: what is left out matters less. Dashed: a number that says nothing."
)
def dropped_expert_cost(results: Results, tokens: Tokens) -> Figure | None:
    if not results.ablations:
        return None
    drawn, grid = drawing.panels(len(results.ablations))
    share = np.linspace(0, 100, STEPS + 1)
    for axes, found in zip(grid, results.ablations, strict=True):
        axes.plot(share, share, color=drawing.FAINT, linestyle=drawing.DASHED, linewidth=1)
        named = {one.name: one for one in found.predictors}
        for name, colour in SHOWN.items():
            if name in named:
                curve = 100 * np.array(named[name].curve)
                axes.plot(share, curve, color=colour, label=PREDICTORS[name][0], linewidth=1.4)
        axes.set_title(results.label(found.method, found.k))
    drawing.legend_above(drawn, grid[0])
    drawn.supxlabel("pairs that are left out (%)", fontsize=9)
    drawn.supylabel("share of all |cost| (%)", fontsize=9)
    return drawn
