"""A MoE block of an exported model: its own experts, chosen by the trained router.

Shapes: T tokens, D model, E experts, F expert width, G = 2 F.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gemoe_ds.export.contexts import Contexts, on
from gemoe_ds.export.offloaded import check_there, device_of, fetched, owners
from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.dispatch import LocalDispatcher, known_sizes
from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.router import Router


class RoutedBlock(nn.Module):
    """What runs in place of a block's forward, and is a module within the block.

    `entry` is what config.json says of the block: what it calls its expert weights, and the
    experts that every token visits.
    """

    _block: nn.Module
    _owners: list[nn.Module]  # of the expert weights

    def __init__(
        self, block: nn.Module, router: Router, contexts: Contexts, entry: dict[str, Any]
    ) -> None:
        super().__init__()
        experts = owners(block, (entry["gate_up"], entry["down"]))
        self.router = router.requires_grad_(False).to(device_of(experts[0]))
        self.contexts = contexts
        self.experts = BlockExperts(block, entry["gate_up"], entry["down"])
        self.dispatcher = LocalDispatcher()
        self._shared: str | None = entry.get("shared")
        # not as a submodule: the block holds this one
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "_owners", experts)

    def take_over(self) -> None:
        """From now on the block computes this."""
        block: Any = self._block
        block.gemoe = self.train(block.training)
        # accelerate's hook, if the block has one, stays around it
        setattr(block, "_old_forward" if hasattr(block, "_hf_hook") else "forward", self.forward)

    # Not compiled: how many rows an expert gets differs in every forward.
    @torch.compiler.disable
    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        ctx, slot = self.contexts.of_block(), self.router.spec.slot
        with ctx.writing(slot, len(x_TD)), fetched(self._owners):
            check_there(self.router, *self._owners)
            y_TD = self._routed(x_TD, on(x_TD.device, ctx))
            ctx.watch(slot, y_TD, training=self.training)
        return y_TD.view(hidden_states.shape)

    def _routed(self, x_TD: Tensor, ctx: TokenContext) -> Tensor:
        x_TD, router = ctx.without_padding(x_TD), self.router
        decision, logits_TE = router.decide(x_TD, ctx)
        record = router.record_of(ctx)
        record.logits_TE, record.mask_TE = logits_TE, router.split(decision.mask_TE)[0]
        writes = not (self.training or torch.is_grad_enabled())
        sizes = known_sizes(router, ctx, writes=writes)
        weights_TE, _ = router.split(decision.weights_TE)
        preprocessed = self.dispatcher.dispatch_preprocess(router.dispatched(decision), sizes)
        free = partial(router.free_output, decision=decision)
        y_TD = self.dispatcher(x_TD, weights_TE, preprocessed, self.experts, free)
        if self._shared is not None:
            y_TD = y_TD + self._block.get_submodule(self._shared)(x_TD)
        return y_TD


class BlockExperts(Experts):
    """The block's own expert weights, wherever they are moved to."""

    _names: tuple[nn.Module, str, str]

    def __init__(self, block: nn.Module, gate_up: str, down: str) -> None:
        nn.Module.__init__(self)
        object.__setattr__(self, "_names", (block, gate_up, down))
        self.pack = False  # whoever loads the model says how much memory it may take, not we

    @property
    def gate_up_EGD(self) -> Tensor:  # type: ignore[override]
        block, gate_up, _ = self._names
        return block.get_parameter(gate_up)

    @property
    def down_EDF(self) -> Tensor:  # type: ignore[override]
        block, _, down = self._names
        return block.get_parameter(down)
