"""What the MoE layers of a model share during a forward: token kinds in, losses out.

Shapes: T tokens of the micro-batch (padding included), L MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossTerm:
    """One auxiliary loss of one layer: a scalar with gradient, and its coefficient."""

    value: Tensor
    weight: float


@dataclass(frozen=True)
class Stat:
    """A number to report that knows how ranks and micro-batches combine.

    `mean`: sum of `total` over sum of `count`; `sum`: sum of `total`. `total` may be a vector
    (a histogram, a load per expert); `count` is a scalar.
    """

    total: Tensor
    reduction: Literal["mean", "sum"] = "mean"
    count: Tensor | float = 1.0


@dataclass
class LayerRecord:
    """The slot of one layer, OVERWRITTEN by every forward; see `TokenContext.writing`.

    `entropy_T` (bits) and `k_T` are kept only where `TokenContext.trace` asks for them. `cache`
    holds what a router computes once and uses again: in a later step, layer or pass.
    """

    losses: dict[str, LossTerm] = field(default_factory=dict)
    stats: dict[str, Stat] = field(default_factory=dict)
    step_counts: dict[str, Tensor] = field(default_factory=dict)
    cache: dict[str, Tensor] = field(default_factory=dict)
    logits_TE: Tensor | None = None
    entropy_T: Tensor | None = None
    k_T: Tensor | None = None


@dataclass(frozen=True)
class Rollout:
    """One forward without gradient before the one that trains; see `Router.rollouts`."""

    log_p_T: Tensor  # log-probability of the token after each, where it is a target; else 0
    is_scored_T: Tensor  # bool: where it is
    cache: list[dict[str, Tensor]]  # of every layer's record


# What a layer's second run, in the backward pass, must find as its first run did.
_OF_A_PASS = (
    "is_valid_T",
    "may_have_padding",
    "is_vision_T",
    "sequence_T",
    "layers",
    "rollout",
    "rolled_out",
)


class TokenContext:
    """Modality and validity of every token, and one `LayerRecord` a layer.

    One object is shared by reference by the model and all its MoE layers; `begin` refills it
    once a forward, before the first layer runs. Layers that run in a backward pass are recomputed:
    they find the last forward that was begun with gradients, whatever was evaluated since.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerRecord() for _ in range(num_layers)]
        self.is_valid_T = torch.ones(0, dtype=torch.bool)
        self.may_have_padding = True
        self.is_vision_T = torch.zeros(0, dtype=torch.bool)
        self.sequence_T = torch.zeros(0, dtype=torch.long)
        self.in_forward = False  # between `begin` and `end`
        self.has_gradient = False  # it was begun with gradients
        self._ran: set[int] = set()  # slots of this forward
        self._with_gradient: dict[str, Any] = {}  # the last forward that was
        self.collect = False  # fill `LayerRecord.stats`
        self.trace = False  # keep `entropy_T` and `k_T`
        self.rollout: str | None = None  # the pass that is under way, if it does not train
        self.rolled_out: dict[str, Rollout] = {}  # the passes before the one that trains

    def begin(self, is_valid_BS: Tensor, is_vision_BS: Tensor) -> None:
        """Start a forward on a batch of B sequences of S tokens (both masks bool [B, S])."""
        num_sequences, length = is_valid_BS.shape
        self.is_valid_T = is_valid_BS.reshape(-1)
        # Asking a GPU would mean to wait for it, longer than it takes to copy the rows.
        self.may_have_padding = is_valid_BS.device.type != "cpu" or not bool(is_valid_BS.all())
        self.is_vision_T = is_vision_BS.reshape(-1)
        self.sequence_T = torch.arange(num_sequences, device=is_valid_BS.device).repeat_interleave(
            length
        )
        self.layers = [LayerRecord() for _ in self.layers]
        self.in_forward, self.has_gradient, self._ran = True, torch.is_grad_enabled(), set()
        if self.has_gradient:
            self._with_gradient = {name: getattr(self, name) for name in _OF_A_PASS}

    def without_padding(self, x_TD: Tensor) -> Tensor:
        """The rows with 0 where they are padding, which may hold NaN or Inf: a factor of 0 would
        pass these on, to gradients too. A copy, if there is any."""
        if not self.may_have_padding:
            return x_TD
        return x_TD.masked_fill(~self.is_valid_T[:, None], 0.0)

    def end(self) -> None:
        """The forward is over: the records stay as they are."""
        self.in_forward = False

    @contextmanager
    def writing(self, slot: int, num_tokens: int) -> Iterator[None]:
        """While a layer runs. What a second run of it would record is forgotten at its end.

        A loss that was recorded there would hold the graph of that run, and with it all the
        activations that recomputation is there to save.
        """
        if torch._C._current_graph_task_id() == -1:  # not in a backward pass
            self._check(slot, num_tokens)
            self._ran.add(slot)
            yield
            return
        now = {name: getattr(self, name) for name in _OF_A_PASS}
        self.__dict__.update(self._with_gradient)
        first, self.layers[slot] = self.layers[slot], LayerRecord()
        try:
            yield
        finally:  # recomputation stops early, by an exception
            self.layers[slot] = first
            self.__dict__.update(now)

    def _check(self, slot: int, num_tokens: int) -> None:
        """That this forward was begun, with these tokens and a slot for every layer."""
        begin = (
            "call ctx.begin(is_valid_BS, is_vision_BS) before every forward, and ctx.end() after"
        )
        if not self.in_forward:
            raise RuntimeError(f"a MoE layer runs in a forward that was not begun: {begin}")
        if slot in self._ran:
            raise RuntimeError(
                f"slot {slot} runs a second time in one forward: {begin}; give every MoE layer of "
                "a model a number of its own, RoutingSpec(slot=0), RoutingSpec(slot=1), ..."
            )
        if slot >= len(self.layers):
            raise RuntimeError(
                f"RoutingSpec(slot={slot}), but the context was made for {len(self.layers)} MoE "
                "layers: TokenContext(num_layers) counts them all"
            )
        if num_tokens != len(self.is_valid_T):
            raise RuntimeError(
                f"a MoE layer is given {num_tokens} tokens, but the forward was begun with "
                f"{len(self.is_valid_T)}: {begin}"
            )

    def mean_losses(self) -> dict[str, LossTerm]:
        """Every auxiliary loss by name, averaged over the layers that have it."""
        terms: dict[str, list[LossTerm]] = {}
        for record in self.layers:
            for name, term in record.losses.items():
                terms.setdefault(name, []).append(term)
        return {
            name: LossTerm(torch.stack([t.value for t in some]).mean(), some[0].weight)
            for name, some in terms.items()
        }
