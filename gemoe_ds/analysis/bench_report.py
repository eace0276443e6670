"""bench_DEVICE.json -> the same as a Markdown page and a plot beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemoe_ds.analysis.record import write_text
from gemoe_ds.analysis.tables import markdown
from gemoe_ds.errors import DataError

Row = dict[str, Any]
OURS = "gemoe_ds"
LABELS = {
    OURS: "gemoe_ds",
    "autoep": "DeepSpeed AutoEP",
    "autoep_grouped": "DeepSpeed AutoEP, grouped_mm",
    "autoep_padded": "DeepSpeed AutoEP, padded to 8",
    "classic_moe": "DeepSpeed MoE layer",
    "hf_eager": "transformers, eager",
    "hf_grouped": "transformers, grouped_mm",
    "dense product": "one dense product of equal FLOPs",
    "router alone": "router alone",
}
MODES = {
    "forward": "Forward",
    "frozen": "Forward and backward, frozen experts",
    "trainable": "Forward and backward, trainable experts",
}


def write_report(results: Path) -> str:
    """Write the page and the plot beside `results`; gives the page."""
    try:
        data = json.loads(results.read_text(encoding="utf-8"))
        page = render(data, results.with_suffix(".png").name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{results} is no benchmark result: {error!r}; run launch/bench.py"
        ) from error
    _draw(data["rows"], results.with_suffix(".png"))
    write_text(results.with_suffix(".md"), page)
    return page


def render(data: Row, figure: str) -> str:
    rows: list[Row] = data["rows"]
    parts = [
        f"# MoE layer, {data['device']}",
        f"{data['machine']}; {data['threads']} threads, {data['dtype']}; {data['date']}, commit "
        f"`{data['commit']}`, {data['seconds'] / 60:.0f} min.\n\n    {data['command']}",
        "Medians over rounds in which all contenders of a table took turns, quartiles in brackets. "
        "*Realised / ideal* is (t at the largest k - t) / (t at the largest k x share of experts "
        "saved), *dense rate* the time of one dense product of as many FLOPs over the layer's, "
        "*router* the share of scores, choice, losses and plan; each is a median of paired rounds. "
        "A last column over 1 says by how much gemoe_ds is faster at the same k (for the padded "
        "layer: at the same mean k).",
        f"![time against mean k]({figure})",
    ]
    for (suite, shape, tokens, ep), some in _grouped(rows).items():
        ranks = f", EP {ep}" if ep > 1 else ""
        parts.append(f"## {suite}: {shape}, {tokens} tokens{' a rank' if ep > 1 else ''}{ranks}")
        for mode, title in MODES.items():
            of_mode = [row for row in some if row["mode"] == mode]
            if of_mode:
                parts += [f"**{title}**", markdown(_table(of_mode))]
    return "\n\n".join(parts) + "\n"


def _grouped(rows: list[Row]) -> dict[tuple[str, str, int, int], list[Row]]:
    groups: dict[tuple[str, str, int, int], list[Row]] = {}
    for row in rows:
        key = (row["suite"], row["shape"], row["tokens"], row["ep"])
        groups.setdefault(key, []).append(row)
    return groups


def _table(rows: list[Row]) -> list[list[str]]:
    head = ["layer", "mean k", "ms", "tokens/s", "GFLOP/s", "realised / ideal", "dense rate"]
    head += ["router", "peak MB", "MB sent", "x gemoe_ds"]
    table = [head]
    for row in rows:
        if row["layer"] in ("dense product", "router alone"):
            continue
        low, high = row["quartiles_ms"]
        traffic = row.get("traffic")
        sent = (traffic["row_bytes"] + traffic["metadata_bytes"]) / 1e6 if traffic else None
        peak = row.get("peak_bytes")
        table.append(
            [
                LABELS.get(row["layer"], row["layer"]),
                f"{row['mean_k']:.2f}",
                f"{row['ms']:.1f} [{low:.1f}, {high:.1f}]",
                f"{row['tokens_per_s']}",
                f"{row['gflops_per_s']:.0f}",
                _number(row.get("realised_over_ideal"), "{:.3f}"),
                _number(row.get("dense_rate_share"), "{:.0%}"),
                _number(row.get("router_share"), "{:.1%}"),
                _number(peak / 1e6 if peak is not None else None, "{:.0f}"),
                _number(sent, "{:.1f}"),
                _number(_against_ours(row, rows), "{:.2f}"),
            ]
        )
    used = [i for i in range(len(head)) if i < 3 or any(line[i] != "-" for line in table[1:])]
    return [[line[i] for i in used] for line in table]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _against_ours(row: Row, rows: list[Row]) -> float | None:
    """Time of a peer over ours at the same mean k."""
    same = [r for r in rows if r["layer"] == OURS and abs(r["mean_k"] - row["mean_k"]) < 0.02]
    if row["layer"] == OURS or not same:
        return None
    ratio: float = row["ms"] / same[0]["ms"]
    return ratio


def _draw(rows: list[Row], path: Path) -> None:
    """Time against mean k, with the ideal: in proportion to k, through the largest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from gemoe_ds.analysis.drawing import COLOURS, DASHED, INK, STYLE

    panels = [
        (key, mode, [r for r in some if r["mode"] == mode])
        for key, some in _grouped(rows).items()
        for mode in MODES
        if key[0] in ("layer", "ep") and any(r["mode"] == mode for r in some)
    ]
    if not panels:
        return
    with plt.rc_context(STYLE):
        columns = min(3, len(panels))
        lines = -(-len(panels) // columns)
        size = (3.4 * columns, 2.8 * lines)
        figure, grid = plt.subplots(
            lines, columns, figsize=size, squeeze=False, layout="constrained"
        )
        for spare in grid.flat[len(panels) :]:
            spare.remove()
        for axes, (key, mode, some) in zip(grid.flat, panels, strict=False):
            ours = sorted((r["mean_k"], r["ms"]) for r in some if r["layer"] == OURS)
            axes.plot(*zip(*ours, strict=True), "o-", color=COLOURS["gemoe"], label="gemoe_ds")
            k, ms = ours[-1]
            axes.plot([0, k], [0, ms], linestyle=DASHED, color=INK, label="ideal")
            for row in some:
                if row["layer"] not in (OURS, "dense product", "router alone"):
                    axes.plot(row["mean_k"], row["ms"], "x", color=INK)
                    label = LABELS.get(row["layer"], row["layer"])
                    axes.annotate(
                        label, (row["mean_k"], row["ms"]), (-5, 0), textcoords="offset points",
                        ha="right", va="center", fontsize=6,
                    )  # fmt: skip
            ep = f", EP {key[3]}" if key[3] > 1 else ""
            axes.set_title(
                f"{MODES[mode].split(',')[0]}, {mode}{ep}" if mode != "forward" else f"Forward{ep}"
            )
            axes.set(xlabel="mean k", ylabel="ms", xlim=(0, None), ylim=(0, None))
        grid.flat[0].legend(loc="upper left")
        figure.savefig(path)
        plt.close(figure)
