"""Experts in 8 and 4 bits beside the same layer in its own dtype: what dequantising them costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.contenders import PAPER_K, runner
from benchmarks.problem import Ours, Problem
from benchmarks.shapes import Shape
from benchmarks.timing import measure, paired
from gemoe_ds.moe.experts.module import Experts, QuantisedExperts
from gemoe_ds.moe.experts.quantised import FORMATS, QuantisedWeight

PLAIN = "as computed"  # the dtype of the products
_BOUND = 0.02  # of outputs beside the dequantised layer's, in bfloat16


def quantised_rows(
    shape: Shape, num_tokens: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """All formats in turn, at the paper's mean k and at the backbone's own."""
    problem = Problem.make(shape, num_tokens, dtype, device)
    plain, ks = problem.experts(False, slice(None)), (PAPER_K, shape.top_k)
    experts: dict[str, Experts] = {PLAIN: plain}
    for name in FORMATS:
        weights = plain.gate_up_EGD, plain.down_EDF
        experts[name] = QuantisedExperts(*(QuantisedWeight.of(name, one) for one in weights))
        _check(problem, experts[name], dtype)
    layers = {(name, k): _with(problem, k, some) for name, some in experts.items() for k in ks}
    rows, saved = [], 1 - PAPER_K / shape.top_k
    for mode in ("forward", "frozen"):
        runs = {f"{n} {k}": runner(layer, problem, mode) for (n, k), layer in layers.items()}
        timings = measure(runs, rounds)
        for name, k in layers:
            own, full, beside = (
                timings[f"{name} {k}"],
                timings[f"{name} {shape.top_k}"],
                timings[f"{PLAIN} {k}"],
            )
            row = {"suite": "quantised", "layer": name, "mean_k": float(k), "mode": mode}
            row |= {"shape": shape.name, "tokens": num_tokens, "ep": 1} | own.row()
            row["bytes"] = _bytes(experts[name])
            row["over_plain"] = round(paired(lambda a, b: a / b, own, beside), 4)
            if k != shape.top_k:
                share = paired(lambda few, all_: (all_ - few) / (all_ * saved), own, full)
                row["realised_over_ideal"] = round(share, 4)
            rows.append(row)
    return rows


def _with(problem: Problem, mean_k: float, experts: Experts) -> Ours:
    ours = Ours(problem, mean_k)
    ours.layer.experts = experts
    return ours


def _bytes(experts: Experts) -> int:
    return sum(buffer.nbytes for buffer in experts.buffers())


@torch.no_grad()
def _check(problem: Problem, experts: Experts, dtype: torch.dtype) -> None:
    """Raise unless a few tokens come out as from the dequantised layer."""
    assert isinstance(experts, QuantisedExperts)
    whole = (
        torch.stack([one.dequantised(e, dtype) for e in range(experts.num_experts)])
        for one in (experts.gate_up, experts.down)
    )
    x_TD = problem.x_TD[:64]
    layers: list[nn.Module] = [
        _with(problem, problem.shape.top_k, some)
        for some in (experts, Experts(*whole, trainable=False))
    ]
    found, wanted = (layer(x_TD).float() for layer in layers)
    error = ((found - wanted).norm() / wanted.norm()).item()
    assert error < _BOUND, f"{error:.3g} off the dequantised layer"
