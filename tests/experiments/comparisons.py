"""Comparisons made of literal numbers."""

from __future__ import annotations

from experiments.comparison import Curve, compare
from tests.analysis.evaluations import record


def row(method, k, mean, mean_k=None, seed=0, **changed):
    per_layer = (k, k) if mean_k is None else (mean_k - 0.5, mean_k + 0.5)
    scores = {"count": mean - 0.1, "fact": mean + 0.1}
    return record(method, k, scores, mean_k_per_layer=per_layer, seed=seed, **changed)


def records(gemoe=0.8, adamoe=0.7, mono_0=0.6, reversed_=0.5):
    return [
        row("top_k", 8, 0.8),
        row("top_k", 4, 0.6),
        row("top_k_tuned", 8, 0.85),
        row("gemoe", None, gemoe - 0.01, 5.0),
        row("gemoe", None, gemoe + 0.01, 5.0, seed=1),
        row("adamoe", None, adamoe, 4.5),
        row("ltdr", None, 0.88, 8.5),
        row("gemoe_mono_0", None, mono_0, 4.5),
        row("gemoe_reversed", None, reversed_, 4.2),
        row("gemoe", None, 0.7, 3.03, budget_k=3.0),
        row("gemoe_budget_6", None, 0.82, 6.12),
    ]


def curves():
    return [
        Curve(method="gemoe", k=None, seed=s, step_S=(1, 2), loss_S=(2 + s, 1), mean_k_S=(5, 4))
        for s in (0, 1)
    ]


def comparison(**scores):
    return compare(records(**scores), curves(), command="make compare", seconds=60)
