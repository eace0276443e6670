"""What the MoE layers of a model share during a forward: token kinds in, losses out.

Shapes: T tokens of the micro-batch (padding included), L MoE layers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from gemoe_ds.moe.passes import Pass, in_backward, next_node, node_in_backward

TEACHER = "teacher"  # `TokenContext.rollout` while every layer routes by its `base`


@dataclass(frozen=True)
class LossTerm:
    """One auxiliary loss of one layer: a scalar with gradient, and its coefficient."""

    value: Tensor
    weight: float
    # A mean over tokens (or the same for all): weighed by their number, that of a step does not
    # depend on how it is cut into micro-batches.
    over_tokens: bool = False

    def weighed(self, of_groups: float, of_tokens: float) -> Tensor:
        """Its part of a loss: by the number of groups of samples, or of tokens."""
        return (of_tokens if self.over_tokens else of_groups) * self.weight * self.value


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

    `entropy_T` (bits), `k_T`, `mask_TE` and `weights_TE`, of the routed experts, are kept only
    where `TokenContext.trace` asks for them. `cache` holds what a router computes once and uses
    again: in a later step, layer or pass.
    """

    losses: dict[str, LossTerm] = field(default_factory=dict)
    stats: dict[str, Stat] = field(default_factory=dict)
    step_counts: dict[str, Tensor] = field(default_factory=dict)
    k_S: Tensor | None = None  # int64: experts of all tokens of each source, with `stats`
    cache: dict[str, Tensor] = field(default_factory=dict)
    groups: list[LayerRecord] = field(default_factory=list)  # see loss_groups.py
    logits_TE: Tensor | None = None
    entropy_T: Tensor | None = None
    k_T: Tensor | None = None
    mask_TE: Tensor | None = None
    weights_TE: Tensor | None = None  # read only where the mask is true


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
    "num_groups",
    "source_T",
    "layers",
    "rollout",
    "rolled_out",
)


class TokenContext:
    """Modality and validity of every token, and one `LayerRecord` a layer.

    One object is shared by reference by the model and all its MoE layers; `begin` refills it
    once a forward, before the first layer runs. Layers that run in a backward pass are recomputed:
    they find the forward that they belong to, whatever ran since.
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
        self._trains = False  # a layer of this forward was in training mode
        self._pass: Pass | None = None  # the last forward, if it has gradients
        self._passes: list[Pass] = []  # those whose backward pass may come, and the last
        self._recomputed: dict[int, dict[str, LossTerm]] = {}  # by slot, without graph
        self.collect = False  # fill `LayerRecord.stats`
        # Where each sequence comes from, int64, a number below `num_sources`, for statistics
        # of each source; None: they are not told apart.
        self.source_B: Tensor | None = None
        self.num_sources = 0
        self.source_T: Tensor | None = None
        # Parts of a micro-batch, of as many rows each, that have auxiliary losses of their own; and
        # for each a number from 0 to 1 that was drawn for it. None: routers draw one for all.
        self.num_groups = 1
        self.drawn_G: Tensor | None = None
        self.trace = False  # keep `entropy_T`, `k_T`, `mask_TE` and `weights_TE`
        self.losses_without_gradient = False  # work out the losses under torch.no_grad() too
        self.rollout: str | None = None  # the pass that is under way, if it does not train
        self.rolled_out: dict[str, Rollout] = {}  # the passes before the one that trains
        self.memory: dict[str, Tensor] = {}  # what routers keep from one forward to the next
        # By slot, what routes instead of the layers' own: for measurements, never in training. They
        # hang in no module: ZeRO 3 would look in them for what DeepSpeed's start adds to modules.
        self.routers: Sequence[Any] | None = None
        # Slot, decision -> what is carried out instead: for measurements, never in training.
        self.intervene: Callable[[int, Any], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model begins with empty records: those here hang in a graph."""
        empty = TokenContext(len(self.layers))
        for switch in ("collect", "trace", "losses_without_gradient"):
            setattr(empty, switch, getattr(self, switch))
        return empty.__dict__

    @property
    def may_go_backward(self) -> bool:
        """A forward that ran here had gradients: a layer that is recomputed may belong to it."""
        return bool(self._passes)

    def begin(
        self,
        is_valid_BS: Tensor | None,
        is_vision_BS: Tensor,
        document_BS: Tensor | None = None,
    ) -> None:
        """Start a forward on a batch of B rows of S tokens (both masks bool [B, S]).

        None: no token is padding. `document_BS`: the number of each token's sequence, int64, where
        a row has several.
        """
        self._fill(is_valid_BS, is_vision_BS, document_BS)
        self.in_forward, self.has_gradient = True, torch.is_grad_enabled()
        self._ran, self._trains = set(), False
        if self._pass:
            self._pass.end()
        self._passes = [one for one in self._passes if one.is_open]
        self._pass, self._recomputed = None, {}
        if self.has_gradient:
            state = {name: getattr(self, name) for name in _OF_A_PASS}
            self._pass = Pass(next_node(), state)
            self._passes.append(self._pass)

    def _fill(
        self,
        is_valid_BS: Tensor | None,
        is_vision_BS: Tensor,
        document_BS: Tensor | None = None,
    ) -> None:
        num_sequences, length = is_vision_BS.shape
        device = is_vision_BS.device
        if is_valid_BS is None:
            self.is_valid_T = torch.ones(num_sequences * length, dtype=torch.bool, device=device)
            self.may_have_padding = False
        else:
            self.is_valid_T = is_valid_BS.reshape(-1)
            # Asking a GPU would mean to wait for it, longer than it takes to copy the rows.
            self.may_have_padding = device.type != "cpu" or not bool(is_valid_BS.all())
        self.is_vision_T = is_vision_BS.reshape(-1)
        if document_BS is None:
            self.sequence_T = torch.arange(num_sequences, device=device).repeat_interleave(length)
        else:
            self.sequence_T = document_BS.reshape(-1)
        self.source_T = None if self.source_B is None else self.source_B[self.sequence_T]
        self.layers = [LayerRecord() for _ in self.layers]

    def by_source(self, value_P: Tensor, source_P: Tensor) -> Tensor:
        """Sums of numbers, each of a source, [S]."""
        return value_P.new_zeros(self.num_sources).index_add_(0, source_P, value_P)

    def without_padding(self, x_TD: Tensor) -> Tensor:
        """The rows with 0 where they are padding, which may hold NaN or Inf: a factor of 0 would
        pass these on, to gradients too. A copy, if there is any."""
        if not self.may_have_padding:
            return x_TD
        return x_TD.masked_fill(~self.is_valid_T[:, None], 0.0)

    def end(self, *, failed: bool = False) -> None:
        """The forward is over: the records stay as they are, and say nothing if it failed."""
        self.in_forward = False
        if failed:
            self._ran = set()

    def begin_alone(self, is_valid_BS: Tensor | None, is_vision_BS: Tensor) -> TokenContext:
        """Of the one layer that has this context for itself: where it runs, until `end_alone`.

        Recomputed, it is given its tokens and masks once more, and needs to find nothing: it runs
        in a copy, so that nothing is to be put back.
        """
        if not in_backward():
            self.begin(is_valid_BS, is_vision_BS)
            return self
        again = copy(self)
        again.memory, again.has_gradient = self.memory, self.has_gradient
        again._fill(is_valid_BS, is_vision_BS)
        return again

    def end_alone(self, ran_in: TokenContext) -> None:
        if ran_in is self:
            self._ran.add(0)
            self.end()
        else:
            self._forget_recomputed(0, ran_in.layers[0])

    @contextmanager
    def writing(self, slot: int, num_tokens: int) -> Iterator[None]:
        """While a layer runs. What a second run of it would record is forgotten at its end.

        A loss that was recorded there would hold the graph of that run, and with it all the
        activations that recomputation is there to save.
        """
        if not in_backward():
            self._check(slot, num_tokens)
            self._ran.add(slot)
            yield
            return
        now = {name: getattr(self, name) for name in _OF_A_PASS}
        self.__dict__.update(self._pass_that_is_recomputed().state)
        first, self.layers[slot] = self.layers[slot], LayerRecord()
        try:
            yield
        finally:  # recomputation stops early, by an exception
            self._forget_recomputed(slot, self.layers[slot])
            self.layers[slot] = first
            self.__dict__.update(now)

    def watch(self, slot: int, y_TD: Tensor, *, training: bool) -> None:
        """A layer has run: the output of the last one tells what becomes of the pass.

        That of the others would not: the losses of the layers above, which are kept, hold its
        graph. No view, which loses its hooks where somebody changes it in place.
        """
        if in_backward():
            return
        self._trains |= training
        if self._pass and slot == len(self.layers) - 1 and y_TD.requires_grad:
            self._pass.watch(y_TD)
            self._pass.trains = self._trains

    def _pass_that_is_recomputed(self) -> Pass:
        node = node_in_backward()
        for one in reversed(self._passes):
            if one.made(node):
                return one
        raise RuntimeError(
            "a MoE layer is recomputed for a forward that is no longer known: another was begun "
            "after its first backward pass; go backward as often as you want before the next "
            "forward, or compute it without recomputation"
        )

    def _forget_recomputed(self, slot: int, record: LayerRecord) -> None:
        """All but the values of the losses, for who asks within what is recomputed."""
        self._recomputed[slot] = {
            name: LossTerm(
                term.value.detach().requires_grad_(term.value.requires_grad),
                term.weight,
                term.over_tokens,
            )
            for name, term in record.losses.items()
        }

    def _check(self, slot: int, num_tokens: int) -> None:
        """That this forward was begun, with these tokens and a slot for every layer."""
        begin = (
            "call ctx.begin(is_valid_BS, is_vision_BS) before every forward, and ctx.end() after"
        )
        if not self.in_forward:
            raise RuntimeError(
                f"a MoE layer runs in a forward that was not begun: {begin}; of a model from "
                "convert(), call the module that convert() was given, not one within it"
            )
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
        return _means([record.losses for record in self.layers])

    def aux_loss(self) -> Tensor:
        """Sum over the auxiliary losses of weight * mean over layers (GeMoE Eq. 13), of the last
        forward; a float32 scalar with its graph. RuntimeError where that is not what is meant.
        """
        if in_backward():  # whoever asks is recomputed; its value is not used any more
            terms = _means([self._recomputed[slot] for slot in sorted(self._recomputed)])
            self._recomputed = {}
        else:
            self._refuse_stale()
            terms = self.mean_losses()
        loss = torch.zeros((), device=self.is_valid_T.device)
        for term in terms.values():
            loss = loss + term.weight * term.value
        return loss

    def _refuse_stale(self) -> None:
        how = "call aux_loss() once after every forward that trains, and before its backward pass"
        if not self._ran or self.in_forward:
            state = "is not over" if self.in_forward else "has not run"
            raise RuntimeError(f"aux_loss(): the forward that it is to be of {state}; {how}")
        if self._pass and self._pass.went_backward:
            raise RuntimeError(f"aux_loss(): the last forward has had its backward pass; {how}")
        if not self.has_gradient and self._trains and torch.is_grad_enabled():
            raise RuntimeError(
                "aux_loss(): the last forward ran without gradients, so its auxiliary losses "
                "would train nothing: remove torch.no_grad(), recompute with use_reentrant=False, "
                "or ask under torch.no_grad() for the value alone"
            )
        if not torch.is_grad_enabled():
            return
        if self._unasked():
            gc.collect()  # a forward that nobody holds any more may hang in a cycle
        if others := self._unasked():
            raise RuntimeError(
                f"aux_loss(): {len(others)} earlier forward(s) in training mode may still go "
                "backward and were not asked for their auxiliary losses, which are lost; "
                f"{how}, and run what does not train under torch.no_grad()"
            )
        if self._pass:
            self._pass.was_asked = True

    def _unasked(self) -> list[Pass]:
        return [
            one
            for one in self._passes
            if one is not self._pass and one.is_open and one.trains and not one.was_asked
        ]


def _means(layers: list[dict[str, LossTerm]]) -> dict[str, LossTerm]:
    terms: dict[str, list[LossTerm]] = {}
    for losses in layers:
        for name, term in losses.items():
            terms.setdefault(name, []).append(term)
    return {
        name: replace(some[0], value=torch.stack([t.value for t in some]).mean())
        for name, some in terms.items()
    }
