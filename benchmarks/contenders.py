"""Who takes part in a benchmark: our layer, parts of it, and the peers, each as a call to time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import optional_peers, peers
from benchmarks.oracle import check
from benchmarks.problem import Ours, Problem
from benchmarks.rows import LABELS, PARTS
from gemoe_ds.engine.world import World

DENSE, ROUTER = PARTS
PAPER_K = 5.1  # mean k at which the headline figure is quoted, of 8


@dataclass
class Contender:
    """A layer (or a part of one) at one mean k."""

    name: str
    mean_k: float
    run: Callable[[], Any]
    num_assignments: int
    errors: dict[str, float] | None = None
    module: nn.Module | None = None


def runner(module: nn.Module, problem: Problem, mode: str) -> Callable[[], Any]:
    """One forward pass, or one with its backward pass, auxiliary losses of ours included."""
    if mode == "forward":

        def forward() -> None:
            with torch.no_grad():
                module(problem.x_TD)

        return forward

    def both() -> None:
        y_TD = module(problem.x_TD.detach().requires_grad_())
        losses = module.losses() if isinstance(module, Ours) else []
        grads = [problem.grad_TD, *(None for _ in losses)]
        torch.autograd.backward([y_TD, *losses], grads)
        module.zero_grad(set_to_none=True)

    return both


class RouterAlone(nn.Module):
    """What routing costs: scores, choice, losses and the plan, with their gradients."""

    def __init__(self, ours: Ours) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x_TD: Tensor) -> Tensor:
        ours = self.ours
        ours.ctx.begin(
            torch.ones(1, len(x_TD), dtype=torch.bool, device=x_TD.device), x_TD[None, :, 0] < -9
        )
        plan = ours.layer.router(x_TD, ours.ctx)
        loss = plan.weights_A.sum()
        for term in ours.losses():
            loss = loss + term
        return loss


def router_runner(ours: Ours, problem: Problem, mode: str) -> Callable[[], Any]:
    router = RouterAlone(ours)

    def forward() -> None:
        with torch.no_grad():
            router(problem.x_TD)

    def both() -> None:
        router(problem.x_TD.detach().requires_grad_()).backward()
        ours.zero_grad(set_to_none=True)

    return forward if mode == "forward" else both


def dense_runner(problem: Problem, num_assignments: int, mode: str) -> Callable[[], Any]:
    """One product of as many operations as the experts' forward pass, once or as often as needed.

    The backward pass with frozen experts multiplies as much again, with trainable ones twice.
    """
    shape, dtype, device = problem.shape, problem.x_TD.dtype, problem.x_TD.device
    rows = torch.randn(num_assignments, shape.d_model, device=device).to(dtype)
    weight = torch.randn(3 * shape.width, shape.d_model, device=device).to(dtype)
    times = {"forward": 1, "frozen": 2, "trainable": 3}[mode]

    def run() -> None:
        for _ in range(times):
            rows @ weight.t()

    return run


def peer_contenders(problem: Problem, names: list[str], mode: str, world: World) -> list[Contender]:
    """The peers on the same weights at the backbone's k, and one that is padded at the paper's."""
    found = []
    top_k = problem.shape.top_k
    for name in names:
        reason = optional_peers.why_not(name, problem.x_TD.dtype, problem.x_TD.device)
        if reason:
            print(f"   {LABELS[name]}: not run, {reason}", flush=True)
            continue
        mean_k = PAPER_K if "padded" in name else float(top_k)
        router = Ours(problem, mean_k, local=slice(0, 1))  # routes; its experts are not used
        module = peers.build(name, problem, router, mode == "trainable", world)
        num_assignments = int(router.routing(problem.x_TD)[0].sum())
        errors = check(name, module, problem, router, norm_topk_prob=name in peers.RENORMALISES)
        run = runner(module, problem, mode)
        found.append(Contender(name, mean_k, run, num_assignments, errors))
    return found
