"""The monotonic loss alone: value and gradient, against all pairs as arrays, and beside its layer.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import PAPER_K, runner
from benchmarks.problem import Ours, Problem
from benchmarks.rows import HINGE, OBVIOUS, OURS
from benchmarks.shapes import Shape
from benchmarks.timing import free_memory, measure, paired
from gemoe_ds.moe.monotonic import monotonic_loss

SLOPE = 1.2
_ARRAYS = 8  # of T x T float32 that the obvious way holds at once, with autograd's


def all_pairs(entropy_T: Tensor, k_soft_T: Tensor) -> Tensor:
    """GeMoE's Eq. 12 as it stands, [T, T] at a time."""
    gap_TT = entropy_T[:, None] - entropy_T
    hinge_TT = (SLOPE * gap_TT - (k_soft_T[:, None] - k_soft_T)).relu()
    is_pair_TT = gap_TT > 0
    return (hinge_TT * is_pair_TT).sum() / is_pair_TT.sum().clamp_min(1)


def ours(entropy_T: Tensor, k_soft_T: Tensor) -> Tensor:
    return monotonic_loss(entropy_T, k_soft_T, slope=SLOPE)


def monotonic_rows(
    shape: Shape, num_tokens: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """Rows of one number of tokens, timed in turn; the layer's backward pass is in."""
    generator = torch.Generator().manual_seed(0)
    entropy_T = (6 * torch.rand(num_tokens, generator=generator)).to(device)
    k_soft_T = (1 + 7 * torch.rand(num_tokens, generator=generator)).to(device)
    _check(entropy_T[:1024], k_soft_T[:1024])
    runs: dict[str, Callable[[], Any]] = {HINGE: _step(ours, entropy_T, k_soft_T)}
    if _ARRAYS * 4 * num_tokens**2 < free_memory() // 2:
        runs[OBVIOUS] = _step(all_pairs, entropy_T, k_soft_T)
    else:
        print(f"   {OBVIOUS}, {num_tokens} tokens: not run, too little memory", flush=True)
    problem = Problem.make(shape, num_tokens, dtype, device)
    runs[OURS] = runner(Ours(problem, PAPER_K), problem, "frozen")
    timings = measure(runs, rounds)
    rows = []
    for name, timing in timings.items():
        row = {
            "suite": "monotonic",
            "layer": name,
            "mean_k": PAPER_K if name == OURS else 0.0,
            "mode": "frozen",
            "shape": shape.name,
            "tokens": num_tokens,
            "ep": 1,
            **timing.row(),
        }
        if name != HINGE:
            share = paired(lambda loss, other: loss / other, timings[HINGE], timing)
            row["loss_share"] = round(share, 5)
        rows.append(row)
    return rows


def _step(
    loss: Callable[[Tensor, Tensor], Tensor], entropy_T: Tensor, k_soft_T: Tensor
) -> Callable[[], None]:
    def run() -> None:
        loss(entropy_T, k_soft_T.detach().requires_grad_()).backward()

    return run


def _check(entropy_T: Tensor, k_soft_T: Tensor) -> None:
    """Raise unless value and gradient are those of the definition in float64."""
    given = entropy_T.double(), k_soft_T.double().requires_grad_()
    want, have = all_pairs(*given), ours(*given)
    for one, other in (
        (have, want),
        *zip(*(torch.autograd.grad(loss, given[1]) for loss in (have, want)), strict=True),
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
