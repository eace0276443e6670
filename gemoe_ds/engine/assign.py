"""Set a trainable parameter between steps, in a way that ZeRO does not undo."""

from __future__ import annotations

import torch
from deepspeed.utils import safe_set_full_fp32_param
from torch import Tensor, nn


@torch.no_grad()
def assign_(parameter: nn.Parameter, value: Tensor) -> None:
    """Write `value` into the parameter AND its float32 master copy.

    Under ZeRO 1 and 2 the next step overwrites the parameter with the master, so writing only the
    parameter is lost silently. Collective: every rank must call it with the same value.
    """
    parameter.copy_(value)
    safe_set_full_fp32_param(parameter, value.to(torch.float32))
