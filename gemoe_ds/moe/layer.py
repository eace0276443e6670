"""MoELayer: route -> dispatch -> experts -> combine (+ free and shared experts)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.dispatch import Dispatcher
from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.router import Router
from gemoe_ds.progress import PROGRESS


class MoELayer(nn.Module):
    """Stands where the backbone's own MoE block stood: x_BSD -> y_BSD.

    `ctx` is shared by all layers and refilled once a forward.
    `shared` (x_TD -> y_TD) is added for every token, whatever was routed.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        dispatcher: Dispatcher,
        ctx: TokenContext,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.dispatcher = dispatcher
        self.ctx = ctx
        self.shared = shared

    def forward(self, x_BSD: Tensor) -> Tensor:
        PROGRESS.enter_layer(self.router.spec.slot)
        with self.ctx.writing(self.router.spec.slot, x_BSD.shape[:-1].numel()):
            return self._forward(x_BSD)

    def _forward(self, x_BSD: Tensor) -> Tensor:
        # One copy for all that follows: nothing here keeps the rows as they came.
        x_TD = self.ctx.without_padding(x_BSD.reshape(-1, x_BSD.shape[-1]))
        # Not as module calls: the hooks of ZeRO 3 know tensors only, and there is no need of them.
        router = self.router
        decision, logits_TE = router.decide(x_TD, self.ctx)
        mask_TE, _ = router.split(decision.mask_TE)
        weights_TE, _ = router.split(decision.weights_TE)
        preprocessed = self.dispatcher.dispatch_preprocess(mask_TE)
        router.record(decision, logits_TE, self.ctx)  # while the counts travel
        if self.training and self.ctx.has_gradient and not torch.is_grad_enabled():
            if router.losses(decision, logits_TE, self.ctx):
                raise RuntimeError(
                    "the forward was begun with gradients, but a MoE layer runs without: its "
                    "auxiliary losses would be lost; recompute with use_reentrant=False, or begin "
                    "under torch.no_grad()"
                )

        def beside(x_TD: Tensor) -> Tensor | None:  # while the rows travel
            free_TD = router.free_output(x_TD, decision)
            shared_TD: Tensor | None = None if self.shared is None else self.shared(x_TD)
            if free_TD is None or shared_TD is None:
                return shared_TD if free_TD is None else free_TD
            return free_TD + shared_TD

        y_TD = self.dispatcher(x_TD, weights_TE, preprocessed, self.experts, beside)
        return y_TD.view(x_BSD.shape)
