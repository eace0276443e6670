"""The rows of a benchmark's results: what their names mean, and which belong together."""

from __future__ import annotations

from typing import Any

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
    "torchtitan": "torchtitan",
    "megatron": "megatron-core",
}
MODES = {
    "forward": "Forward",
    "frozen": "Forward and backward, frozen experts",
    "trainable": "Forward and backward, trainable experts",
}
EXCHANGE = "plain exchange"  # an all-to-all of nothing else
HINGE = "monotonic loss"
OBVIOUS = "the same, written out"  # all pairs as arrays of T x T
PARTS = ("dense product", "router alone")  # not layers; shown as shares of them


def grouped(rows: list[Row]) -> dict[tuple[str, str, int, int], list[Row]]:
    groups: dict[tuple[str, str, int, int], list[Row]] = {}
    for row in rows:
        key = (row["suite"], row["shape"], row["tokens"], row["ep"])
        groups.setdefault(key, []).append(row)
    return groups
