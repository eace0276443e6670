"""Which tokens of a forward are padding, by the attention mask that its model got.

Shapes: B sequences, S tokens of this forward, P tokens of forwards before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def valid_tokens(given: Mapping[str, Any], shape: torch.Size, way_out: str) -> Tensor | None:
    """bool [B, S] of what `attention_mask` says; None: there is no padding.

    With a cache the mask covers the P tokens before as well. A mask [B, 1, S, P + S] (with a static
    cache wider) says what sees what, and padding does not see itself. Of several, by the kind of a
    layer, that of full attention says it. RuntimeError, which ends in `way_out`, if none does.
    """
    mask: Any = given.get("attention_mask")
    if isinstance(mask, Mapping) and mask:
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return None
    num_tokens, past = shape[1], given.get("past_key_values")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= num_tokens:
        return mask[:, -num_tokens:] != 0
    before = 0 if past is None else int(past.get_seq_length())
    wide = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == num_tokens
    if wide and mask.shape[3] >= before + num_tokens:
        itself_BS: Tensor = mask[:, 0].diagonal(before, dim1=1, dim2=2)
        sees_BS = itself_BS if mask.dtype == torch.bool else itself_BS == 0
        return sees_BS[:, :num_tokens].expand(shape)
    said = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    raise RuntimeError(
        f"attention_mask {said} does not say which of {list(shape)} tokens are padding: {way_out}"
    )
