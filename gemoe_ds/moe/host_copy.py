"""Numbers that the host needs from the device: fetched while the device works on something else, or
once for as long as they do not change."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A copy under way to the host, which waits in `value` for no more than what came before it."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._copied = numbers, None
        if numbers.device.type == "cuda":
            # Into pinned memory: any other copy would wait here and now.
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.current_stream(numbers.device).record_event()

    @property
    def value(self) -> Tensor:
        """On the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers


class Remembered:
    """The value of a buffer of one number that seldom changes: asked for once after a change."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._version = -1
        self._value = 0.0

    def of(self, buffer: Tensor) -> float:
        version = -1 if buffer.is_inference() else buffer._version  # -1: changes are not counted
        if self._buffer is not buffer or self._version != version or version < 0:
            self._buffer, self._version, self._value = buffer, version, buffer.item()
        return self._value
