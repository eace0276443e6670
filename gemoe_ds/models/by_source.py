"""Cross-entropies of single targets, and sums over the samples of each source.

Shapes: P targets, V vocabulary, S sources.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemoe_ds.moe.context import TokenContext

_AT_ONCE = 1024  # targets whose logits are float32 at a time


@torch.no_grad()
def ce_by_target(logits_PV: Tensor, targets_P: Tensor) -> Tensor:
    """Float32 [P]."""
    parts = zip(logits_PV.split(_AT_ONCE), targets_P.split(_AT_ONCE), strict=True)
    ce = [nn.functional.cross_entropy(a.float(), b, reduction="none") for a, b in parts]
    return torch.cat(ce)


@torch.no_grad()
def sums_by_source(
    ctx: TokenContext, logits_PV: Tensor, targets_P: Tensor, is_target_BS: Tensor
) -> Tensor:
    """Of the samples of each source, float64 [S, 2]: the sum of the cross-entropies of their
    targets, and that of the experts of their tokens, over all layers."""
    assert ctx.source_T is not None, "begun with sources"
    source_P = ctx.source_T[is_target_BS.flatten()]
    ce_S = ctx.by_source(ce_by_target(logits_PV, targets_P).double(), source_P)
    k_LS = torch.stack([record.k_S for record in ctx.layers if record.k_S is not None])
    return torch.stack([ce_S, k_LS.sum(0).double()], 1)
