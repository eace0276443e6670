"""Before anything is timed: is it right? Output and gradients against a plain float32 computation.

Routing and experts work token by token, so the output and the input gradient of some tokens need
these tokens only; an expert's weight gradient needs all of its tokens, and is checked for some
experts. Shapes: T tokens, D model, E experts, F width, s sampled tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.problem import Ours, Problem

_TOKENS, _EXPERTS = 128, 2
BOUND = {torch.bfloat16: 0.02, torch.float32: 1e-4}


def relative_error(have: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what should be."""
    have, want = have.detach().float(), want.detach().float()
    return float((have - want).norm() / want.norm().clamp_min(1e-20))


def typical_error(have: Tensor, want: Tensor) -> float:
    """The median over tokens: for layers that route in bf16, where a few tokens go another way."""
    have, want = have.detach().float(), want.detach().float()
    return float(((have - want).norm(dim=1) / want.norm(dim=1).clamp_min(1e-20)).median())


def sampled_tokens(num_tokens: int) -> Tensor:
    return torch.linspace(0, num_tokens - 1, min(_TOKENS, num_tokens)).long().unique()


def plain_moe(x_sD: Tensor, mask_sE: Tensor, weights_sE: Tensor, problem: Problem) -> Tensor:
    """Every expert on its tokens, in float32, one line of mathematics at a time."""
    weights = problem.weights
    y_sD = torch.zeros_like(x_sD)
    for expert in range(mask_sE.shape[1]):
        ids = mask_sE[:, expert].nonzero()[:, 0]
        gate, up = (x_sD[ids] @ weights.gate_up_EGD[expert].float().t()).chunk(2, -1)
        out = (nn.functional.silu(gate) * up) @ weights.down_EDF[expert].float().t()
        y_sD = y_sD.index_add(0, ids, weights_sE[ids, expert, None] * out)
    return y_sD


def check(
    name: str, layer: nn.Module, problem: Problem, router: Ours, *, norm_topk_prob: bool = False
) -> dict[str, float]:
    """The relative errors of a layer that should route as `router` does; raises if one is too big.

    Forward, input gradient, and, if the layer is one of ours whose experts train on one rank, the
    gradients of some experts. Auxiliary losses are left out here: they have tests of their own.
    With `norm_topk_prob` the chosen scores are divided by their sum.
    """
    ids = sampled_tokens(problem.x_TD.shape[0]).to(problem.x_TD.device)
    x_sD = problem.x_TD[ids].float().requires_grad_()
    router.ctx.begin(torch.ones(1, len(ids), dtype=torch.bool, device=ids.device), ids[None] < 0)
    decision, _ = router.layer.router.decide(x_sD, router.ctx)
    weights_sE = decision.weights_TE * decision.mask_TE
    if norm_topk_prob:
        weights_sE = weights_sE / weights_sE.sum(1, keepdim=True)
    y_sD = plain_moe(x_sD, decision.mask_TE, weights_sE, problem)
    (grad_sD,) = torch.autograd.grad(y_sD, x_sD, problem.grad_TD[ids].float())

    x_TD = problem.x_TD.clone().requires_grad_()
    got_TD = layer(x_TD)
    got_TD.backward(problem.grad_TD)
    assert x_TD.grad is not None
    error = relative_error if isinstance(layer, Ours) else typical_error
    errors = {
        "output": error(got_TD[ids], y_sD),
        "input gradient": error(x_TD.grad[ids], grad_sD),
    }
    if isinstance(layer, Ours) and layer.layer.experts.gate_up_EGD.grad is not None:
        errors |= _expert_gradients(layer, problem)
    layer.zero_grad(set_to_none=True)
    bound = BOUND[problem.x_TD.dtype]
    wrong = {what: error for what, error in errors.items() if not error < bound}
    if wrong:
        raise AssertionError(f"{name} is wrong, so there is nothing to time: {wrong} >= {bound}")
    return errors


def _expert_gradients(layer: Ours, problem: Problem) -> dict[str, float]:
    """Of the first busy experts, from all of their tokens; one rank only."""
    experts, weights = layer.layer.experts, problem.weights
    mask_TE, weights_TE = layer.routing(problem.x_TD)
    if experts.num_experts != mask_TE.shape[1]:
        return {}
    errors: dict[str, float] = {}
    for expert in mask_TE.any(0).nonzero()[:_EXPERTS, 0].tolist():
        ids = mask_TE[:, expert].nonzero()[:, 0]
        own = [w[expert].float().requires_grad_() for w in (weights.gate_up_EGD, weights.down_EDF)]
        gate, up = (problem.x_TD[ids].float() @ own[0].t()).chunk(2, -1)
        out = weights_TE[ids, expert, None] * ((nn.functional.silu(gate) * up) @ own[1].t())
        want = torch.autograd.grad(out, own, problem.grad_TD[ids].float())
        have = (experts.gate_up_EGD.grad, experts.down_EDF.grad)
        for name, a, b in zip(("gate and up", "down"), have, want, strict=True):
            assert a is not None
            key = f"{name} gradient"
            errors[key] = max(errors.get(key, 0.0), relative_error(a[expert], b))
    return errors
