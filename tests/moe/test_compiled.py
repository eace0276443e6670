"""torch.compile of one layer: two breaks, one compilation for all lengths, and what eager gives."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import gemoe_ds.routers  # noqa: F401  (registers every router)
from gemoe_ds.moe.router import Router
from tests.moe.layers import build, tokens

LENGTHS = (5, 9, 12, 33, 64, 7)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


def compile_layer(layer, backend="aot_eager"):
    """With the same parameters; what was recorded is each one's own."""
    twin = copy.deepcopy(layer)
    return torch.compile(twin, dynamic=True, backend=backend), twin


def train(call, layer, x, **masks):
    """y, the auxiliary loss, and all gradients."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = call(x, **masks)
    aux = layer.aux_loss()
    (y.square().sum() + aux).backward()
    return [y, aux, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


def as_eager(layer, backend="aot_eager"):
    """Six lengths, each as eager mode has it."""
    compiled, twin = compile_layer(layer, backend)
    for seed, length in enumerate(LENGTHS):
        x = tokens(2, length, seed=seed).detach()
        valid = torch.arange(length).expand(2, -1) < length - 1 - seed % 3
        torch.manual_seed(seed)  # threshold draws a number
        want = train(layer, layer, x, is_valid=valid)
        torch.manual_seed(seed)
        found = train(compiled, twin, x, is_valid=valid)
        assert torch.equal(layer.k, twin.k)
        assert len(found) == len(want) > 4
        for one, other in zip(found, want, strict=True):
            torch.testing.assert_close(one, other)
    assert sum(counters["graph_break"].values()) <= 2
    assert counters["stats"]["unique_graphs"] == 1


def test_training_is_as_in_eager_mode():
    layer = build()
    as_eager(layer)
    # Recomputed, it is given its tokens once more, and the record of the forward stays.
    x = tokens(2, 11).detach()
    with torch._dynamo.config.patch(error_on_recompile=False):  # one more graph without padding
        recompute(layer, x)


def recompute(layer, x):
    compiled, twin = compile_layer(layer)
    want = train(layer, layer, x)
    found = train(lambda x: checkpoint(compiled, x, use_reentrant=False), twin, x)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other)


def test_inference_breaks_twice_and_compiles_once():
    layer = build().eval()
    with torch.no_grad():
        compiled, twin = compile_layer(layer, "eager")
        for length in LENGTHS:
            x = tokens(2, length)
            assert torch.equal(compiled(x), layer(x)) and torch.equal(twin.k, layer.k)
            assert torch.equal(twin.aux_loss(), layer.aux_loss())
        assert sum(counters["graph_break"].values()) <= 2
        assert counters["stats"]["unique_graphs"] == 1
    with torch._dynamo.config.patch(error_on_recompile=False):
        with torch.no_grad(), pytest.raises(ValueError, match="tokens .*16. are wanted"):
            compiled(torch.randn(3, 4, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name", Router.names())
def test_every_router(name):
    as_eager(build(name))


@pytest.mark.slow
def test_the_compiler_itself():
    as_eager(build(), "inductor")
