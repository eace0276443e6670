"""Kernels run where Triton and a CUDA device are, and nowhere else."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from gemoe_ds.moe.triton_launch import available


def test_triton_is_optional() -> None:
    program = (
        "import sys, torch; sys.modules['triton'] = None;"
        "from gemoe_ds.moe import monotonic; from gemoe_ds.moe.experts import kernels;"
        "assert not monotonic.available(torch.device('cuda'))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
def test_available_on_cuda_alone() -> None:
    assert available(torch.device("cuda", 0))
    assert not available(torch.device("cpu"))
