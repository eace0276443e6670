"""The plan of a step lists what the mask chose, expert by expert."""

from __future__ import annotations

from hypothesis import given, settings

from gemoe_ds.moe.plan import RoutingPlan
from tests.moe.oracle import RAGGED, ragged_problem


@settings(max_examples=30, deadline=None)
@given(**RAGGED)
def test_plan_lists_the_mask(seed, tokens, experts, density):
    _, mask, weights, *_ = ragged_problem(seed, tokens, experts, density)
    plan = RoutingPlan.from_mask(mask, weights)
    listed = [(e, t) for e in range(experts) for t in range(tokens) if mask[t, e]]
    assert plan.tokens_per_expert_E.tolist() == [
        sum(e == i for e, _ in listed) for i in range(experts)
    ]
    assert plan.token_ids_A.tolist() == [t for _, t in listed]
    assert plan.expert_ids_A.tolist() == [e for e, _ in listed]
    assert plan.weights_A.tolist() == [weights[t, e].item() for e, t in listed]
    assert (plan.num_tokens, plan.num_experts) == (tokens, experts)
    order, ends = (one.tolist() for one in plan.row_major())
    of_tokens = sorted(range(len(listed)), key=lambda a: (listed[a][1], listed[a][0]))
    assert order == of_tokens
    assert ends == mask.sum(1).cumsum(0).tolist()
    if not mask.numel():
        return
    spare = RoutingPlan.from_mask(
        mask, weights, num_assignments=len(listed) + 3, may_have_spare=True
    )
    order, ends = (one.tolist() for one in spare.row_major())
    assert order == [*of_tokens, len(listed), len(listed) + 1, len(listed) + 2]
    assert ends == mask.sum(1).cumsum(0).tolist()
    assert spare.without_spare().token_ids_A.tolist() == plan.token_ids_A.tolist()
