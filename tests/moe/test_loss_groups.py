"""Losses by groups of a micro-batch are those of the groups, each as a micro-batch of its own."""

from __future__ import annotations

import pytest
import torch

from gemoe_ds.moe.context import LossTerm
from gemoe_ds.moe.router import Router
from tests.routers.cases import SPEC, all_variants, case_id, make_context, make_router

GROUPS, ROWS, LENGTH = 3, 2, 7
LENGTHS = (7, 4, 3, 2, 0, 0)  # of the rows' tokens: the last group has none
every_variant = pytest.mark.parametrize(
    "case",
    [
        (name, options)
        for name, options in all_variants()
        if not Router.named(name).bound_to_micro_batch(Router.named(name).Config(**options))
    ],
    ids=case_id,
)


def batch(first: int, end: int):
    """The context and the tokens of some of the rows."""
    generator = torch.Generator().manual_seed(3)
    x_BSD = torch.randn(len(LENGTHS), LENGTH, SPEC.d_model, generator=generator)
    valid_BS = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
    vision_BS = valid_BS & (torch.arange(LENGTH) < 2)
    ctx = make_context(valid_BS[first:end], vision_BS[first:end])
    return x_BSD[first:end].flatten(0, 1), ctx


def terms_of(router: Router, first: int, end: int, drawn_G: torch.Tensor) -> dict[str, LossTerm]:
    x_TD, ctx = batch(first, end)
    ctx.num_groups, ctx.drawn_G = len(drawn_G), drawn_G
    router(x_TD, ctx)
    return ctx.layers[0].losses


@every_variant
def test_losses_and_gradients_are_those_of_the_groups(case):
    router, drawn_G = make_router(*case).train(), torch.tensor([0.1, 0.5, 0.8])
    found = []
    for num_groups in (GROUPS, 1):
        router.zero_grad()
        if num_groups == GROUPS:
            terms = terms_of(router, 0, len(LENGTHS), drawn_G)
        else:
            parts = [
                terms_of(router, ROWS * g, ROWS * (g + 1), drawn_G[g : g + 1])
                for g in range(GROUPS)
            ]
            tokens = [sum(LENGTHS[ROWS * g : ROWS * (g + 1)]) for g in range(GROUPS)]
            terms = {}
            for name, term in parts[0].items():
                weights = tokens if term.over_tokens else [float(t > 0) for t in tokens]
                total = sum(w * p[name].value for w, p in zip(weights, parts, strict=True))
                terms[name] = LossTerm(total / sum(weights), term.weight, term.over_tokens)
        if terms:
            sum(term.value for term in terms.values()).backward()
        gradients = {n: p.grad for n, p in router.named_parameters() if p.grad is not None}
        found.append(({n: t.value.detach() for n, t in terms.items()}, gradients))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@every_variant
def test_a_loss_that_is_not_said_to_depend_on_its_samples_is_a_mean_over_tokens(case):
    """That of all tokens is that of two halves, weighed by their tokens."""
    name, options = case
    router = make_router(*case).train()
    said = router.shared_by_samples(router.config)
    if "the mean k that each sequence draws" in said:
        pytest.skip("what is drawn differs")
    drawn = torch.tensor([0.5])
    whole = terms_of(router, 0, 4, drawn)
    halves = [terms_of(router, 0, 2, drawn), terms_of(router, 2, 4, drawn)]
    for loss, term in whole.items():
        a, b = (half[loss].value.item() for half in halves)
        mean = (a * sum(LENGTHS[:2]) + b * sum(LENGTHS[2:4])) / sum(LENGTHS[:4])
        is_mean = abs(term.value.item() - mean) <= 1e-5 * max(1.0, abs(mean))
        assert is_mean or not term.over_tokens, f"{loss} says that it is"
        if term.weight and not term.over_tokens:
            assert loss in said
