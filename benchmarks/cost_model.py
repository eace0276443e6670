"""What a MoE layer costs on so many ranks: products at a measured rate, messages, bytes.

    t(layer) = fixed * tokens + FLOPs / rate + messages * alpha + bytes / beta

fitted on measured rows of EP 1 (fixed, rate) and EP 2 (alpha, beta), checked on EP 4, then used
for GPUs whose figures come from data sheets. Measured: the lower quartile of the rounds. A token's
row crosses to a rank once: the number of pairs is that of ranks that hold at least one of its k
experts.

Assumptions: experts are loaded evenly, exchanges do not overlap with anything (no shared experts),
ranks on one host share its cores and its memory bus, one rank a GPU.

Shapes: T tokens a rank, R ranks of an expert-parallel group, E experts, D model, F expert width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.rows import EXCHANGE, OURS, Row
from gemoe_ds.models.cost.layer_time import EXCHANGES, IN_TURN, PRODUCTS, TRIPS, Layer, Machine


def fit(rows: list[Row], layer: Layer) -> Machine:
    """A host from measured rows (both modes): compute from EP 1, messages and bytes from EP 2."""
    compute = [
        (PRODUCTS[r["mode"]] * np.array([r["tokens"], layer.flops(r["tokens"], r["mean_k"])]), r)
        for r in of_ours(rows, "layer", 1)
    ]
    fixed, per_flop = _least_squares(compute, [seconds_of(r) for _, r in compute])
    alone = Machine(fixed, 1 / per_flop, 0.0, np.inf, shared=True)
    messages, rest = [], []
    for r in of_ours(rows, "ep", 2):
        t, k, mode = r["tokens"], r["mean_k"], r["mode"]
        unknowns = [EXCHANGES[mode], 2 * TRIPS[mode] * layer.bytes(t, k, 2)]
        messages.append((np.array(unknowns, dtype=float), r))
        rest.append(max(seconds_of(r) - alone.seconds(layer, t, k, 2, mode), 0.0))
    alpha, per_byte = _least_squares(messages, rest)
    return Machine(fixed, 1 / per_flop, alpha, 1 / max(per_byte, 1e-15), shared=True)


def _least_squares(equations: list[tuple[Any, Row]], seconds: list[float]) -> tuple[float, float]:
    """Non-negative, every equation weighed by what was measured: relative errors count."""
    weights = 1 / np.array([seconds_of(r) for _, r in equations])
    matrix = np.stack([unknowns for unknowns, _ in equations]) * weights[:, None]
    scale = matrix.max(0)
    scale[scale == 0] = 1
    first, second = nnls(matrix / scale, np.array(seconds) * weights)[0] / scale
    return float(first), float(second)


def seconds_of(row: Row) -> float:
    """The lower quartile: what else runs on a machine only ever adds time."""
    low: float = row["quartiles_ms"][0]
    return low / 1e3


def of_ours(rows: list[Row], suite: str, ep: int) -> list[Row]:
    return [
        r
        for r in rows
        if (r["suite"], r["ep"], r["layer"]) == (suite, ep, OURS) and r["mode"] in EXCHANGES
    ]


def compare(machine: Machine, rows: list[Row], layer: Layer) -> list[Row]:
    """Predicted and measured time of every row of several ranks; `of` says what it was used for."""
    found = []
    for r in [r for ep in (2, 4, 8) for r in of_ours(rows, "ep", ep)]:
        predicted = machine.seconds(layer, r["tokens"], r["mean_k"], r["ep"], r["mode"])
        found.append(_compared(r, predicted, "fit" if r["ep"] == 2 else "check"))
    for r in of_ours(rows, "links", 2):
        alpha, per_byte = _link([row for row in rows if row.get("link") == r["link"]])
        # the ranks' work, and what each sends, through a link of its own
        sent = TRIPS[r["mode"]] * layer.bytes(r["tokens"], r["mean_k"], 2)
        work = machine.seconds(layer, r["tokens"], r["mean_k"], 1, r["mode"])
        predicted = 2 * work + IN_TURN[r["mode"]] * alpha + sent * per_byte
        found.append(_compared(r, predicted, f"check, {r['link']}"))
    return found


def _link(rows: list[Row]) -> tuple[float, float]:
    """Seconds of a message and of a byte, from the link's plain exchanges."""
    small, large = sorted((r["bytes"], seconds_of(r)) for r in rows if r["layer"] == EXCHANGE)
    per_byte = (large[1] - small[1]) / (large[0] - small[0])
    return small[1] - small[0] * per_byte, per_byte


def _compared(row: Row, predicted: float, of: str) -> Row:
    measured = seconds_of(row)
    return {
        **{key: row[key] for key in ("ep", "mode", "mean_k", "tokens")},
        "of": of,
        "measured_ms": round(1e3 * measured, 1),
        "predicted_ms": round(1e3 * predicted, 1),
        "error": round(predicted / measured - 1, 3),
    }
