"""The plots of a benchmark: time against mean k, and the cost model against what was measured."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.rows import LABELS, MODES, OURS, PARTS, Row, grouped
from gemoe_ds.analysis.drawing import COLOURS, DASHED, INK, OTHERS, STYLE


def draw_layers(rows: list[Row], path: Path) -> None:
    """Time against mean k, with the ideal: in proportion to k, through the largest."""
    panels = [
        (key, mode, [r for r in some if r["mode"] == mode])
        for key, some in grouped(rows).items()
        for mode in MODES
        if key[0] in ("layer", "ep") and any(r["mode"] == mode for r in some)
    ]
    if not panels:
        return
    with rc_context(STYLE):
        columns = min(3, len(panels))
        lines = -(-len(panels) // columns)
        figure = Figure(figsize=(3.4 * columns, 2.8 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        for spare in grid.flat[len(panels) :]:
            spare.remove()
        for axes, (key, mode, some) in zip(grid.flat, panels, strict=False):
            ours = sorted((r["mean_k"], r["ms"]) for r in some if r["layer"] == OURS)
            axes.plot(*zip(*ours, strict=True), "o-", color=COLOURS["gemoe"], label="gemoe_ds")
            k, ms = ours[-1]
            axes.plot([0, k], [0, ms], linestyle=DASHED, color=INK, label="ideal")
            for row in some:
                if row["layer"] != OURS and row["layer"] not in PARTS:
                    axes.plot(row["mean_k"], row["ms"], "x", color=INK)
                    label = LABELS.get(row["layer"], row["layer"])
                    axes.annotate(
                        label, (row["mean_k"], row["ms"]), (-5, 0), textcoords="offset points",
                        ha="right", va="center", fontsize=6,
                    )  # fmt: skip
            ep = f", EP {key[3]}" if key[3] > 1 else ""
            axes.set_title(MODES[mode].replace("Forward and backward", "Both") + ep)
            axes.set(xlabel="mean k", ylabel="ms", xlim=(0, None), ylim=(0, None))
        grid.flat[0].legend(loc="upper left")
        figure.savefig(path)


def draw_cost(cost: Row, path: Path) -> None:
    """Predicted against measured time; tokens a second against GPUs, with and without GeMoE."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for of, colour in (("fit", INK), ("check", COLOURS["gemoe"])):
            some = [row for row in cost["compared"] if row["of"].startswith(of)]
            points = [(row["measured_ms"], row["predicted_ms"]) for row in some]
            if points:
                left.plot(*zip(*points, strict=True), "o", color=colour, label=of)
        largest = max(row["measured_ms"] for row in cost["compared"])
        left.plot([0, largest], [0, largest], linestyle=DASHED, color=INK)
        left.set(xlabel="measured, ms", ylabel="predicted, ms", title="A layer on this host")
        left.legend()
        names = dict.fromkeys(row["backbone"] for row in cost["projected"])
        for name, colour in zip(names, OTHERS, strict=False):
            some = [r for r in cost["projected"] if r["backbone"] == name and r["ep"] == 8]
            gpus = [r["gpus"] for r in some]
            right.loglog(gpus, [r["tokens_per_s"] for r in some], color=colour, label=name)
            full = [r["tokens_per_s"] / r["speed_up"] for r in some]
            right.loglog(gpus, full, color=colour, linestyle=DASHED)
        title = "Projected, EP 8 (dashed: all experts)"
        right.set(xlabel="GPUs", ylabel="tokens/s", title=title)
        right.legend(fontsize=7)
        figure.savefig(path)
