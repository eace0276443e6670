"""What runs while rows travel, and how often the host waits for the device.

One process plays a group of one rank: an exchange delivers its rows only when it is waited for.
"""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.dispatch import AllToAllDispatcher, LocalDispatcher
from gemoe_ds.moe.experts import ffn, grouped
from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.layer import MoELayer
from gemoe_ds.moe.router import RoutingSpec
from gemoe_ds.routers.gemoe import GeMoERouter

D, F, E, T = 16, 8, 4, 12


class Slow:
    """all_to_all of one rank: what is sent arrives at `wait`, and not before."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def __call__(self, output, rows, output_splits, input_splits):
        self.log.append("start")
        if output.is_floating_point():
            output.fill_(torch.nan)
        sent = rows.clone()

        class Work:
            def wait(work) -> None:
                self.log.append("wait")
                output.copy_(sent)

        return Work()


class Logged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor, log):
        ctx.save_for_backward(x, factor)
        ctx.log = log
        log.append("shared")
        return factor * x

    @staticmethod
    def backward(ctx, grad):
        ctx.log.append("shared backward")
        x, factor = ctx.saved_tensors
        return factor * grad, (grad * x).sum(), None


class Shared(torch.nn.Module):
    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(0.5))
        self.log = log

    def forward(self, x_TD):
        return Logged.apply(x_TD, self.factor, self.log)


def make_layer(dispatcher, shared=None) -> MoELayer:
    torch.manual_seed(0)
    router = GeMoERouter(GeMoERouter.Config(), RoutingSpec(D, E, 3, False))
    weights = torch.randn(E, 2 * F, D), torch.randn(E, D, F)
    ctx = TokenContext(1)
    ctx.begin(torch.arange(T)[None] < T - 2, torch.zeros(1, T, dtype=torch.bool))
    experts = Experts(*weights, trainable=True)
    return MoELayer(router, experts, dispatcher, ctx, shared)


def test_shared_expert_and_losses_run_while_rows_and_counts_travel():
    slow = Slow()
    layer = make_layer(AllToAllDispatcher(slow, 0, 1), Shared(slow.log))
    losses = layer.router.losses

    def logged_losses(*args):
        slow.log.append("losses")
        return losses(*args)

    layer.router.losses = logged_losses
    x = torch.randn(1, T, D, requires_grad=True)
    y = layer(x)
    counts, out, home = ["start", "losses", "wait"], ["start", "start"], ["start", "wait"]
    assert slow.log == [*counts, *out, "shared", "wait", "wait", *home]
    slow.log.clear()
    y.square().sum().backward()
    assert slow.log == [*home, *out, "shared backward", "wait", "wait"]

    plain = make_layer(LocalDispatcher(), Shared([]))
    x_plain = x.detach().clone().requires_grad_()
    want = plain(x_plain)
    want.square().sum().backward()
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(x.grad, x_plain.grad)
    for (name, a), b in zip(layer.named_parameters(), plain.parameters(), strict=True):
        if a.grad is not None or b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_input_without_gradient_sends_none_back():
    slow = Slow()
    layer = make_layer(AllToAllDispatcher(slow, 0, 1))
    y = layer(torch.randn(1, T, D))
    slow.log.clear()
    y.sum().backward()
    assert slow.log == ["start", "wait"] * 2, "the gradient of the sums, and of the weights"
    assert layer.router.gate.weight.grad.abs().sum() > 0


class HostWaits(TorchDispatchMode):
    """Operations whose result's size, or a Python number, depends on what the device computed."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "item")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        bool_index = name in ("index", "index_put_", "index_put") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        sized = (kwargs or {}).get("output_size") is not None or len(args) != 1
        if name in self.NAMES or bool_index or (name == "repeat_interleave" and not sized):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def waits_of(dispatcher) -> tuple[list[str], int]:
    layer = make_layer(dispatcher)
    x = torch.randn(1, T, D, requires_grad=True)
    lists = []
    tolist = torch.Tensor.tolist

    def counted(tensor):
        lists.append(tensor.shape)
        return tolist(tensor)

    with (
        patch.object(ffn, "path_for", lambda *_: grouped),
        patch.object(torch.Tensor, "tolist", counted),
        HostWaits() as waits,
    ):
        y = layer(x)
        losses = sum(term.value for term in layer.ctx.mean_losses().values())
        (y.sum() + losses).backward()
    return waits.found, len(lists)


def test_the_host_waits_once_a_layer():
    """Routing, losses, exchange, experts, backward pass: on a GPU one wait, for the counts."""
    for dispatcher in (LocalDispatcher(), AllToAllDispatcher(Slow(), 0, 1)):
        assert waits_of(dispatcher) == ([], 1)
