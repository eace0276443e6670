"""Where the time of the expert layer goes, and how many bytes each stage moves and must move.

A stage must read its input once and write its output once; what it moves on top of that are passes
that a fused kernel would not make. On a CPU they happen in the cache, one expert at a time.

Shapes: N rows, A assignments, E experts, D model, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.problem import Ours, Problem
from gemoe_ds.moe.plan import RoutingPlan

_OPS = {  # stage -> the operations of torch that it consists of, in by_expert.forward
    "gather": ("aten::index_select",),
    "products": ("aten::mm", "mkldnn::_linear_pointwise"),
    "activation": ("aten::silu", "aten::mul_"),
    "combine": ("aten::scatter_add_", "aten::index_add_", "aten::copy_", "aten::fill_"),
}
_REPEATS = 5


@torch.no_grad()
def stage_rows(problem: Problem, mean_k: float) -> list[dict[str, Any]]:
    """One row a stage of the experts' forward pass on a CPU, and one of what is left."""
    ours = Ours(problem, mean_k)
    plan = RoutingPlan.from_mask(*ours.routing(problem.x_TD))
    experts = ours.layer.experts

    def run() -> None:
        for _ in range(_REPEATS):
            experts(problem.x_TD, plan)

    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    times = {event.key: event.self_cpu_time_total / 1e3 for event in profiler.key_averages()}
    total = sum(times.values()) / _REPEATS
    must, moved = minimal_bytes(problem, plan), moved_bytes(problem, plan)
    rows = []
    for stage, ops in _OPS.items():
        ms = sum(times.get(op, 0.0) for op in ops) / _REPEATS
        rows.append(_row(problem, plan, stage, ms, total, must[stage], moved[stage]))
    rest = total - sum(row["ms"] for row in rows)
    return [*rows, _row(problem, plan, "calls and allocation", rest, total, 0, 0)]


def minimal_bytes(problem: Problem, plan: RoutingPlan) -> dict[str, int]:
    """Input once, output once, in the dtype of the rows."""
    a, n, d, f, size = _sizes(problem, plan)
    weights = 3 * int((plan.tokens_per_expert_E > 0).sum()) * d * f
    return {
        "gather": size * 2 * a * d,
        "products": size * (weights + a * (d + 2 * f) + a * (f + d)),
        "activation": size * a * 3 * f,
        "combine": size * (a + n) * d,
    }


def moved_bytes(problem: Problem, plan: RoutingPlan) -> dict[str, int]:
    """What by_expert's operations read and write, one after the other."""
    a, n, d, f, size = _sizes(problem, plan)
    wide = 4 if size == 2 else size
    return minimal_bytes(problem, plan) | {
        "activation": size * a * f * (2 + 3 + 2),  # silu; times up; times weight
        # to float32, added to the sums; the sums set to zero and rounded at the end
        "combine": a * d * ((size + wide) + 3 * wide) + n * d * (2 * wide + size),
    }


def _sizes(problem: Problem, plan: RoutingPlan) -> tuple[int, int, int, int, int]:
    shape = problem.shape
    a = plan.token_ids_A.numel()
    return a, plan.num_tokens, shape.d_model, shape.width, problem.x_TD.itemsize


def _row(
    problem: Problem,
    plan: RoutingPlan,
    stage: str,
    ms: float,
    total: float,
    must: int,
    moved: int,
) -> dict[str, Any]:
    return {
        "suite": "stages",
        "layer": stage,
        "mean_k": round(plan.token_ids_A.numel() / plan.num_tokens, 3),
        "mode": "forward",
        "shape": problem.shape.name,
        "tokens": plan.num_tokens,
        "ep": 1,
        "ms": round(ms, 2),
        "share": round(ms / total, 4),
        "minimal_bytes": must,
        "moved_bytes": moved,
    }
