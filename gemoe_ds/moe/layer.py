"""MoELayer: route -> dispatch -> experts -> combine (+ shared experts), hidden to hidden."""

from __future__ import annotations

from torch import Tensor, nn

from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.dispatch import Dispatcher
from gemoe_ds.moe.experts import Experts
from gemoe_ds.moe.router import Router


class MoELayer(nn.Module):
    """Stands where the backbone's own MoE block stood: x_BSD -> y_BSD.

    `ctx` is shared by all layers and refilled once a forward; this layer writes slot `slot`.
    `shared` (x_TD -> y_TD) is added for every token, whatever was routed.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        dispatcher: Dispatcher,
        ctx: TokenContext,
        slot: int,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.dispatcher = dispatcher
        self.ctx = ctx
        self.slot = slot
        self.shared = shared

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        # Not as module calls: the hooks of ZeRO 3 know tensors only, and there is no need of them.
        decision, logits_TE = self.router.decide(x_TD, self.ctx)
        announced = self.dispatcher.announce(decision.mask_TE)
        self.router.record(decision, logits_TE, self.ctx, self.slot)  # while the counts travel
        y_TD = self.dispatcher(x_TD, decision.weights_TE, announced, self.experts, self.shared)
        return y_TD.view(x_BSD.shape)
