"""Triton's interpreter with bfloat16 as a GPU has it: its own truncates to it, and multiplies bits.

For kernels whose products are of bfloat16; what test_kernels.py allows for truncation is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np


@contextmanager
def bfloat16_as_on_a_gpu() -> Iterator[None]:
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, truncate = InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc

    def widened(one: Any) -> Any:
        if one.dtype.scalar != tl.bfloat16:
            return one
        bits = one.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        return dot(self, widened(a), widened(b), *more)

    def create_fp_trunc(self: Any, one: Any, dtype: Any) -> Any:
        if dtype.scalar == tl.bfloat16 and one.dtype.scalar == tl.float32:
            bits = one.data.view(np.uint32)
            nearest = bits + 0x7FFF + ((bits >> 16) & 1)
            nearest = np.where(np.isnan(one.data), bits, nearest).astype(np.uint32)
            one = TensorHandle(nearest.view(np.float32), tl.float32)
        return truncate(self, one, dtype)

    with (
        mock.patch.object(InterpreterBuilder, "create_dot", create_dot),
        mock.patch.object(InterpreterBuilder, "create_fp_trunc", create_fp_trunc),
    ):
        yield
