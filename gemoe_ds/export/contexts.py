"""What the routed blocks of an exported model know of the forward that runs: for each thread its
own, so that requests which are answered at once do not mix."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.passes import in_backward


class Contexts:
    """Of one model; all its blocks have this object. A copy of a model begins with none.

    What routers remember from one forward to the next is the model's, not a thread's.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._memory: dict[str, Tensor] = {}
        self._of_thread = threading.local()
        self._last_with_gradients: TokenContext | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._num_layers,)

    @property
    def own(self) -> TokenContext:
        """That of the thread that asks."""
        found: TokenContext | None = getattr(self._of_thread, "ctx", None)
        if found is None:
            found = self._of_thread.ctx = TokenContext(self._num_layers)
            found.memory = self._memory
        return found

    def begin(self, is_valid_BS: Tensor | None, is_vision_BS: Tensor) -> None:
        """A forward of this thread; see `TokenContext.begin`."""
        self.own.begin(is_valid_BS, is_vision_BS)
        self._of_thread.batch_size = len(is_vision_BS)
        if torch.is_grad_enabled():
            self._last_with_gradients = self.own

    def of_block(self) -> TokenContext:
        """That of the forward which a block runs in. RuntimeError if none was begun.

        A block that is recomputed may run in a thread of autograd, which calls no model.
        """
        ctx = self.own
        if in_backward():
            ctx = ctx if ctx.may_go_backward else self._last_with_gradients or ctx
        elif not ctx.in_forward:
            raise RuntimeError(
                "a MoE block runs outside a forward of its model, which knows what is padding: "
                "call the model that from_pretrained gave, not a module within it"
            )
        return ctx

    @property
    def k_per_layer(self) -> list[Tensor]:
        """k of every token of this thread's last forward, int64 [B, S] a layer. RuntimeError if
        there was none."""
        masks = [record.mask_TE for record in self.own.layers]
        found = [m.sum(1).view(self._of_thread.batch_size, -1) for m in masks if m is not None]
        if not found:
            raise RuntimeError(
                "k_per_layer: no forward has run yet in this thread; call the model first"
            )
        return found


def on(device: torch.device, ctx: TokenContext) -> TokenContext:
    """The same forward, its masks on the device of the block that asks; records are shared."""
    if ctx.is_valid_T.device == device:
        return ctx
    moved = TokenContext.__new__(TokenContext)  # a copy would begin empty
    moved.__dict__.update(ctx.__dict__)
    for name in ("is_valid_T", "is_vision_T", "sequence_T"):
        setattr(moved, name, getattr(ctx, name).to(device))
    return moved
