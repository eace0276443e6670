"""Auxiliary losses of a micro-batch in groups of samples, as if each group were a micro-batch.

So a step may be cut into other micro-batches without changing what is minimised: most of these
losses are no means over tokens, but products of means, or compare all tokens with each other.

Shapes: T tokens, G groups, whose rows stand one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from gemoe_ds.moe.context import LayerRecord, LossTerm, TokenContext

_OF_TOKENS = re.compile(r"_T[A-Z0-9]*$")  # the end of a name whose first dimension is T
Losses = Callable[[Any, Tensor, TokenContext], dict[str, LossTerm]]  # `Router.losses`


def losses_by_group(
    losses: Losses, slot: int, decision: Any, logits_TE: Tensor, ctx: TokenContext
) -> dict[str, LossTerm]:
    """The losses of one layer; with `ctx.num_groups` their mean over the groups that have a token.

    A loss that is a mean over tokens stays that of all of them.
    """
    if ctx.num_groups == 1:
        return losses(decision, logits_TE, ctx)
    record, num_groups = ctx.layers[slot], ctx.num_groups
    record.groups = [
        LayerRecord(cache=_of_group(record.cache, group, num_groups)) for group in range(num_groups)
    ]
    found = []
    for group in range(num_groups):
        own = {one.name: getattr(decision, one.name) for one in fields(decision)}
        part = replace(decision, **_of_group(own, group, num_groups))
        found.append(losses(part, logits_TE.chunk(num_groups)[group], _context(ctx, group)))
    tokens_G = ctx.is_valid_T.view(num_groups, -1).sum(1)
    return {
        name: replace(term, value=_mean([terms[name] for terms in found], tokens_G))
        for name, term in found[0].items()
    }


def _mean(terms: list[LossTerm], tokens_G: Tensor) -> Tensor:
    weight_G = tokens_G if terms[0].over_tokens else tokens_G > 0
    value_G = torch.stack([term.value for term in terms])
    return (value_G * weight_G).sum() / weight_G.sum().clamp_min(1)


def _of_group(tensors: Mapping[str, Any], group: int, num_groups: int) -> dict[str, Any]:
    """What belongs to its tokens, by the names; the rest as it is."""
    return {
        name: value.chunk(num_groups)[group] if _OF_TOKENS.search(name) else value
        for name, value in tensors.items()
    }


def _context(ctx: TokenContext, group: int) -> TokenContext:
    """What `Router.losses` reads: the group's tokens, and its records of all layers."""
    part = TokenContext(0)
    part.layers = [
        record.groups[group] if record.groups else LayerRecord() for record in ctx.layers
    ]
    names = ("is_valid_T", "is_vision_T", "sequence_T")
    tensors = {name: getattr(ctx, name) for name in names}
    part.__dict__.update(_of_group(tensors, group, ctx.num_groups))
    part.may_have_padding, part.has_gradient = ctx.may_have_padding, ctx.has_gradient
    return part
