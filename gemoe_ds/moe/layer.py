"""MoELayer: route -> dispatch -> experts -> combine, hidden to hidden."""

from __future__ import annotations

from torch import Tensor, nn

from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.dispatch import Dispatcher
from gemoe_ds.moe.experts import Experts
from gemoe_ds.moe.router import Router


class MoELayer(nn.Module):
    """Stands where the backbone's own MoE block stood: x_BSD -> y_BSD.

    `ctx` is shared by all layers and refilled once a forward; this layer writes slot `slot`.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        dispatcher: Dispatcher,
        ctx: TokenContext,
        slot: int,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.dispatcher = dispatcher
        self.ctx = ctx
        self.slot = slot

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        # Not as a module call: the hooks of ZeRO 3 know tensors only, and there is no need of them.
        plan = self.router.forward(x_TD, self.ctx, self.slot)
        return self.dispatcher(x_TD, plan, self.experts).view(x_BSD.shape)
