"""MoE layers in a model of somebody else: not begun is refused, recomputed is the same."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gemoe_ds.moe.context import LayerRecord, LossTerm, TokenContext
from gemoe_ds.moe.dispatch import LocalDispatcher
from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.layer import MoELayer
from tests.routers.cases import SPEC, at_slot, make_router

VALID = torch.ones(2, 5, dtype=torch.bool)
SOME = VALID.clone()
SOME[:, 3:] = False


def make_layers(slots=(0, 1), router="gemoe"):
    ctx = TokenContext(len(slots))
    torch.manual_seed(0)
    weights = torch.randn(8, 12, 16), torch.randn(8, 16, 6)
    layers = [
        MoELayer(
            make_router(router, {}, at_slot(SPEC, slot), seed=number),
            Experts(*weights, trainable=False),
            LocalDispatcher(),
            ctx,
        )
        for number, slot in enumerate(slots)
    ]
    return ctx, torch.nn.Sequential(*layers)


def tokens(seed=1):
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed))


def test_a_forward_that_was_not_begun_is_refused():
    ctx, layers = make_layers()
    with pytest.raises(RuntimeError, match="not begun: call ctx.begin"):
        layers(tokens())
    ctx.begin(VALID, ~VALID)
    layers(tokens())
    with pytest.raises(RuntimeError, match="slot 0 runs a second time .*ctx.begin"):
        layers(tokens(2))  # no end
    ctx.end()
    with pytest.raises(RuntimeError, match="not begun"):
        layers(tokens(2))
    ctx.begin(VALID, ~VALID)
    with pytest.raises(RuntimeError, match="given 8 tokens, but .* begun with 10"):
        layers(tokens()[:, :4])


@pytest.mark.parametrize(
    "slots, told", [((0, 0), "slot 0 runs a second time"), ((0, 2), "slot=2.* 2 MoE layers")]
)
def test_every_layer_has_a_slot_of_its_own(slots, told):
    ctx, layers = make_layers(slots)
    ctx.begin(VALID, ~VALID)
    with pytest.raises(RuntimeError, match=told):
        layers(tokens())


def gradients(recompute: bool, meanwhile=lambda ctx, layers: None):
    ctx, layers = make_layers()
    x_BSD = tokens().requires_grad_()
    ctx.begin(SOME, ~VALID)
    y_BSD = x_BSD
    for layer in layers:
        y_BSD = checkpoint(layer, y_BSD, use_reentrant=False) if recompute else layer(y_BSD)
    ctx.end()
    loss = y_BSD.square().sum() + sum(t.value for t in ctx.mean_losses().values())
    meanwhile(ctx, layers)
    loss.backward()
    return [x_BSD.grad, *(p.grad for p in layers.parameters() if p.requires_grad)]


def evaluates(ctx, layers):
    with torch.no_grad():
        for valid_BS in (VALID, VALID[:1]):
            ctx.begin(valid_BS, ~valid_BS)
            layers(tokens(3)[: len(valid_BS)])
            ctx.end()


@pytest.mark.parametrize("meanwhile", [lambda *_: None, evaluates])
def test_recomputation_finds_the_forward_that_trains(meanwhile):
    """After others of the same shape and of another, in which nothing was padding."""
    for found, expected in zip(gradients(True, meanwhile), gradients(False), strict=True):
        assert expected.abs().sum() > 0
        assert torch.equal(found, expected)


def test_recomputation_leaves_what_was_evaluated_since():
    kept = []

    def meanwhile(ctx, layers):
        ctx.collect = True
        evaluates(ctx, layers)
        kept.extend([ctx, ctx.layers, ctx.layers[0].stats["mean_k"].count])

    gradients(True, meanwhile)
    ctx, records, count = kept
    assert ctx.layers is records and count == 5 and len(ctx.is_valid_T) == 5


def test_reentrant_recomputation_is_the_same_or_refused():
    """Its first run has no gradient, so that an auxiliary loss would be lost."""
    found = []
    for recompute in (False, True):
        ctx, layers = make_layers((0,), "top_p")
        layers.eval()  # no auxiliary losses
        x_BSD = tokens().requires_grad_()
        ctx.begin(SOME, ~VALID)
        y_BSD = checkpoint(layers, x_BSD, use_reentrant=True) if recompute else layers(x_BSD)
        ctx.end()
        y_BSD.square().sum().backward()
        found.append(x_BSD.grad)
    assert torch.equal(*found)
    ctx.begin(SOME, ~VALID)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        checkpoint(layers.train(), x_BSD, use_reentrant=True)


def test_context_averages_losses_over_layers_that_have_them():
    ctx = TokenContext(3)
    for slot, value in ((0, 1.0), (2, 3.0)):
        ctx.layers[slot] = LayerRecord(losses={"x": LossTerm(torch.tensor(value), 0.5)})
    term = ctx.mean_losses()["x"]
    assert (term.value.item(), term.weight) == (2.0, 0.5)
    ctx.begin(torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool))
    assert not ctx.mean_losses() and ctx.sequence_T.tolist() == [0, 0, 0, 1, 1, 1]
