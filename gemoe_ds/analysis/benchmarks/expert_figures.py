"""Further figures: which experts the tokens of a benchmark go to, and how alike experts are.

Shapes: L MoE layers, E experts, D width of the gate.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gemoe_ds.analysis import drawing
from gemoe_ds.analysis.benchmarks.collect import ModeRun
from gemoe_ds.analysis.benchmarks.figures import (
    Drawn,
    Gates,
    colour_of,
    figure,
    file_name,
    heat,
    shown_groups,
    some_layers,
)
from gemoe_ds.analysis.benchmarks.groups import Model
from gemoe_ds.analysis.routing_sums import IMAGE

_PATHS = 6  # between two layers, of a benchmark


@figure
def tokens_per_expert(model: Model, gates: Gates) -> Iterable[Drawn]:
    groups = ([model.baseline] if model.baseline else []) + shown_groups(model)
    wide = Figure(figsize=(max(3.2 * len(groups), 4.6), 3.6), layout="constrained")
    grid = wide.subplots(1, len(groups), sharey=True, squeeze=False)[0] if groups else []
    most = max((_share_LE(group.first).max() for group in groups), default=0)
    image = None
    for axes, group in zip(grid, groups, strict=True):
        share_LE = _share_LE(group.first)
        image = heat(axes, share_LE, group.label, cmap="Blues", vmin=0, vmax=most)
        axes.set_yticks(range(len(share_LE)), [str(layer + 1) for layer in range(len(share_LE))])
        axes.set_xlabel("expert")
    if groups:
        grid[0].set_ylabel("MoE layer")
        wide.colorbar(image, ax=list(grid), label="share of the tokens (%)")  # type: ignore[arg-type]
        caption = (
            "How many of the tokens an expert gets, layer by layer, over all benchmarks, each of "
            "which counts the same (the paper's Fig. 7; first seed). The mean of a line is mean k "
            "/ number of experts."
        )
        yield "tokens_per_expert", caption, wide


def _share_LE(run: ModeRun) -> np.ndarray:
    """Percent of the tokens that an expert gets."""
    shares = [100 * sums.load_LE / sums.num_tokens for sums in run.routing.values()]
    return np.mean(shares, axis=0)


@figure
def load_by_modality(model: Model, gates: Gates) -> Iterable[Drawn]:
    for group in shown_groups(model):
        sums = [one for one in group.first.routing.values() if one.tokens_M[IMAGE]]
        if not sums:
            continue
        image_LE = np.sum([one.load_MLE[IMAGE] for one in sums], axis=0)
        text_LE = np.sum([one.load_LE for one in sums], axis=0) - image_LE
        layers = some_layers(group.first)
        drawn = Figure(figsize=(7.2, 1.5 * len(layers) + 0.8), layout="constrained")
        grid = drawn.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
        for axes, layer in zip(grid, layers, strict=True):
            for name, colour, load_LE, shift in (
                ("image tokens", drawing.IMAGE, image_LE, -0.2),
                ("text tokens", drawing.TEXT, text_LE, 0.2),
            ):
                load_E = load_LE[layer]
                share_E = 100 * load_E / max(load_E.sum(), 1)
                axes.bar(np.arange(load_E.size) + shift, share_E, 0.4, color=colour, label=name)
            axes.set_title(f"Layer {layer + 1}")
            axes.grid(False, axis="x")
        grid[-1].set_xlabel("expert")
        grid[-1].xaxis.set_major_locator(MaxNLocator(9, integer=True))
        drawn.supylabel("share of the load (%)", fontsize=9)
        drawing.legend_above(drawn, grid[0])
        caption = (
            f"Load of the experts by image and text tokens, {group.label} (the paper's Fig. 12; "
            "first seed, all benchmarks with pictures together). Each modality adds up to 100 %."
        )
        yield f"load_by_modality_{file_name(group)}", caption, drawn


@figure
def routing_paths(model: Model, gates: Gates) -> Iterable[Drawn]:
    for group in shown_groups(model):
        sums = group.first.routing
        if group.first.mode.num_layers < 2:
            continue
        drawn, grid = drawing.panels(len(sums))
        experts = group.first.mode.num_experts
        for axes, (heading, one) in zip(grid, sums.items(), strict=True):
            for layer, count_EE in enumerate(one.transitions_LEE):
                share_EE = count_EE / max(count_EE.sum(), 1)
                for place in np.argsort(share_EE, axis=None)[::-1][:_PATHS]:
                    start, end = divmod(int(place), experts)
                    width = 12 * share_EE[start, end]
                    if width:
                        axes.plot(
                            [layer + 1, layer + 2],
                            [start, end],
                            color=colour_of(model, group),
                            linewidth=max(0.4, min(width, 5)),
                            alpha=0.75,
                            solid_capstyle="round",
                        )
            axes.set_title(heading)
            axes.set_ylim(-1, experts)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        drawn.supxlabel("MoE layer", fontsize=9)
        drawn.supylabel("expert", fontsize=9)
        caption = (
            f"Where the heaviest expert of a token leads, {group.label} (the paper's Fig. 11; "
            f"first seed): the {_PATHS} most frequent steps from each layer to the next. Wider is "
            "more frequent."
        )
        yield f"routing_paths_{file_name(group)}", caption, drawn


@figure
def expert_similarity(model: Model, gates: Gates) -> Iterable[Drawn]:
    if not gates:
        return
    layers = some_layers(model.groups[0].first)
    size = (2.3 * max(len(layers), 2) + 0.8, 2.1 * len(gates) + 0.5)
    drawn = Figure(figsize=size, layout="constrained")
    grid = drawn.subplots(len(gates), len(layers), squeeze=False)
    image = None
    for line, (name, gate_LED) in zip(grid, gates.items(), strict=True):
        for axes, layer in zip(line, layers, strict=True):
            cosine_EE = similarity(gate_LED[layer])
            apart = cosine_EE[~np.eye(len(cosine_EE), dtype=bool)]
            mean = f"mean {np.abs(apart).mean():.3f}" if apart.size else ""
            title = f"{name}, layer {layer + 1}"
            image = heat(axes, cosine_EE, title, cmap="RdBu_r", vmin=-1, vmax=1)
            axes.set_xlabel(mean, fontsize=8)
            axes.set_xticks([])
            axes.set_yticks([])
    drawn.colorbar(image, ax=list(grid.flat), label="cosine")  # type: ignore[arg-type]
    caption = (
        "How alike the experts are to the router: cosine of their gate weights (the paper's "
        "Fig. 10). Below: mean of |cosine| over pairs of experts."
    )
    yield "expert_similarity", caption, drawn


def similarity(gate_ED: np.ndarray) -> np.ndarray:
    """Cosines [E, E]; 0 with an expert whose weights are all 0."""
    norm_E1 = np.linalg.norm(gate_ED, axis=1, keepdims=True)
    unit_ED = np.divide(gate_ED, norm_E1, out=np.zeros_like(gate_ED), where=norm_E1 > 0)
    return unit_ED @ unit_ED.T
