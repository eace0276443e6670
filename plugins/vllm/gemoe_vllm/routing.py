"""One layer's routing as vLLM asks for it: K expert ids and weights a token, of our own decision.

Shapes: T tokens, D model, E experts, K slots (the router's largest k).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gemoe_vllm._gemoe.moe.context import LayerRecord, TokenContext
from gemoe_vllm._gemoe.moe.router import Router
from gemoe_vllm.counts import LayerCounts
from gemoe_vllm.options import FOLD, PADDING, RAGGED, ZERO

NO_EXPERT = -1  # a slot without expert, for `ragged` alone: vLLM's CPU kernel computes nonsense


class ServedContext(TokenContext):
    """The context of a server: no padding that matters, text alone, and no forward to begin."""

    def __init__(self, num_layers: int, max_tokens: int, device: torch.device) -> None:
        super().__init__(num_layers)
        self.may_have_padding = False
        # Views of these are given out, since what is made while a CUDA graph is captured is not
        # there when another one runs.
        self._true_T = torch.ones(max_tokens, dtype=torch.bool, device=device)
        self._false_T = torch.zeros(max_tokens, dtype=torch.bool, device=device)
        self._zero_T = torch.zeros(max_tokens, dtype=torch.long, device=device)

    def take(self, num_tokens: int, slot: int) -> None:
        """Before a layer runs on so many tokens."""
        if num_tokens > len(self._true_T):
            self.__init__(len(self.layers), num_tokens, self._true_T.device)  # type: ignore[misc]
        if num_tokens != len(self.is_valid_T):
            self.is_valid_T = self._true_T[:num_tokens]
            self.is_vision_T = self._false_T[:num_tokens]
            self.sequence_T = self._zero_T[:num_tokens]
        self.layers[slot] = LayerRecord()


class Routing:
    """vLLM's `custom_routing_function` of one layer."""

    def __init__(
        self,
        router: Router,
        ctx: ServedContext,
        slots: str,
        counts: LayerCounts | None = None,
        served: Callable[[int], Tensor | bool] = lambda num_tokens: True,
    ) -> None:
        """`served(T)`: which rows belong to requests, bool [T], or whether all or none do."""
        self.router, self.ctx, self.slots = router, ctx, slots
        self.width = min(router.max_k, router.spec.num_experts)
        self.counts, self.served = counts, served
        self.given: tuple[Tensor, Tensor] | None = None  # what is answered instead, once

    def __call__(
        self,
        hidden_states: Tensor,
        gating_output: Tensor | None = None,
        topk: int | None = None,
        renormalize: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """weights_TK float32 and ids_TK int32 of hidden_states [T, D]; the rest is not read."""
        if self.given is not None:
            return self.given
        ctx, router = self.ctx, self.router
        ctx.take(len(hidden_states), router.spec.slot)
        decision, logits_TE = router.decide(hidden_states, ctx)
        router.record(decision, logits_TE, ctx)  # the next layer may read its logits
        mask_TE, _ = router.split(decision.mask_TE)
        weights_TE, _ = router.split(decision.weights_TE)
        if self.counts is not None:
            self.counts.add(mask_TE, self.served(len(hidden_states)))
        return in_slots(mask_TE, weights_TE, self.width, self.slots)


def in_slots(mask_TE: Tensor, weights_TE: Tensor, width: int, slots: str) -> tuple[Tensor, Tensor]:
    """weights_TK and ids_TK, the largest weight first; what `slots` says where there is no expert.

    No token has more than `width` experts. Weights of chosen experts are not negative.
    """
    num_experts = mask_TE.shape[1]
    weights_TK, ids_TK = weights_TE.masked_fill(~mask_TE, -1.0).topk(width, dim=-1)
    used_TK = weights_TK >= 0
    weights_TK = weights_TK.clamp_min(0.0)
    ids_TK = ids_TK.to(torch.int32)
    if slots == FOLD:
        ids_TK = torch.where(used_TK, ids_TK, ids_TK[:, :1])
    elif slots == RAGGED:
        ids_TK = ids_TK.masked_fill(~used_TK, NO_EXPERT)
    elif slots == PADDING:
        ids_TK = ids_TK.masked_fill(~used_TK, num_experts)
    else:
        assert slots == ZERO, slots
    return weights_TK, ids_TK
