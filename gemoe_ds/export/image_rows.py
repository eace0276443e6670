"""`image_rows` [B, P] of a prompt: which row of all image features a position takes.

-1: none. -2: none, but the token stands for an image (its frame, ends of its lines).
"""

from __future__ import annotations

from torch import Tensor, nn

OF_FRAME = -2


def aligned(rows_BP: Tensor, length: int) -> Tensor:
    """The last `length` positions [B, S]; tokens that came after the prompt are of no image."""
    missing = length - rows_BP.shape[1]
    if missing > 0:
        return nn.functional.pad(rows_BP, (0, missing), value=-1)
    return rows_BP[:, -length:]
