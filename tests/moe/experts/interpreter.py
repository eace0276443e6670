"""Kernels in Triton's interpreter, which a process must ask for before it imports Triton."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np


def interpreted(module: str) -> str:
    """What a module prints that runs its kernels in the interpreter, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_checks(checks: Sequence[tuple[Callable[..., None], tuple]]) -> int:
    """Each with its case, on the CPU; how many failed."""
    failed = 0
    for check, case in checks:
        try:
            check("cpu", *case)
        except Exception:
            failed += 1
            print(f"{check.__name__}{case}\n{traceback.format_exc()}")
    print(f"{len(checks)} checks, {failed} failed")
    return failed


@contextmanager
def bfloat16_as_on_a_gpu() -> Iterator[None]:
    """The interpreter's own truncates to it, and multiplies its bits: for kernels whose products
    are of bfloat16. What test_kernels.py allows for truncation is left out then."""
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
