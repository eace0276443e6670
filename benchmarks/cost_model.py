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

from dataclasses import dataclass
from math import exp, lgamma
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.rows import EXCHANGE, OURS, Row

EXCHANGES = {"forward": 4, "frozen": 7}  # counts, rows, metadata, home; and three gradients
IN_TURN = {"forward": 3, "frozen": 5}  # those that wait for another; rows and metadata go at once
TRIPS = {"forward": 1, "frozen": 2}  # how often rows go there and back
PRODUCTS = {"forward": 1, "frozen": 2}  # how often the experts' products are computed


@dataclass(frozen=True)
class Layer:
    """One MoE layer and how it is routed."""

    d_model: int
    width: int
    num_experts: int
    itemsize: int = 2

    def flops(self, tokens: int, mean_k: float) -> float:
        return 6.0 * self.d_model * self.width * tokens * mean_k

    def pairs(self, tokens: int, mean_k: float, ranks: int) -> float:
        """(token, remote rank) pairs of one rank: 1 - C(E - E/R, k) / C(E, k) a remote rank."""
        return tokens * (ranks - 1) * (1 - _none_of(self.num_experts, ranks, mean_k))

    def bytes(self, tokens: int, mean_k: float, ranks: int) -> float:
        """One rank's rows there and back, and eight bytes of metadata an assignment."""
        rows = 2 * self.pairs(tokens, mean_k, ranks) * self.d_model * self.itemsize
        return rows + 8 * tokens * mean_k * (ranks - 1) / ranks


def _none_of(num_experts: int, ranks: int, k: float) -> float:
    """Probability that a rank holds none of k experts chosen evenly; k may be a mean."""
    elsewhere = num_experts - num_experts / ranks
    if k > elsewhere:
        return 0.0
    log = lgamma(elsewhere + 1) - lgamma(elsewhere - k + 1)
    return exp(log - lgamma(num_experts + 1) + lgamma(num_experts - k + 1))


@dataclass(frozen=True)
class Machine:
    """Of one rank, or of one host whose ranks share everything."""

    fixed_s_per_token: float  # routing and what else does not depend on k
    flops_per_s: float
    alpha_s: float  # a message
    bytes_per_s: float
    shared: bool = False  # ranks share cores and links: work and bytes of all of them add up

    def seconds(self, layer: Layer, tokens: int, mean_k: float, ranks: int, mode: str) -> float:
        """One layer, forward or forward and backward with frozen experts."""
        sharing = ranks if self.shared else 1
        compute = (
            tokens * self.fixed_s_per_token * PRODUCTS[mode]
            + PRODUCTS[mode] * layer.flops(tokens, mean_k) / self.flops_per_s
        )
        if ranks == 1:
            return sharing * compute
        messages = EXCHANGES[mode] * (ranks - 1)
        moved = TRIPS[mode] * layer.bytes(tokens, mean_k, ranks)
        return sharing * (compute + moved / self.bytes_per_s) + messages * self.alpha_s


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
