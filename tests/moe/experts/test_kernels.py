"""The Triton kernels equal plain torch: interpreted on the CPU, and on a GPU where there is one.

Triton reads TRITON_INTERPRET as it is imported, and interprets everything from then on. So the
interpreted checks run in a process of their own: `python -m tests.moe.experts.test_kernels`. What
the interpreter accepts need not compile: the kernels are compiled for GPUs here as well, unrun.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

from gemoe_ds.moe.experts import kernels
from tests.moe.experts.interpreter import interpreted, run_checks

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # it truncates to bf16; a GPU rounds
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# (rows, F, dtype): one block and several, whole and broken, none of them a power of two
SWIGLU_CASES = [
    (0, 24, BF16),
    (1, 1, F32),
    (1, 24, F32),
    (5, 24, F32),
    (37, 24, BF16),
    (18, 24, F16),
    (7, 40, BF16),
    (4, 256, BF16),
    (3, 1024, BF16),
    (3, 1060, F32),
    (2, 2051, BF16),
    (3, 2051, F32),
]
# (most assignments of a row, rows summed into, D, dtype, dtype of the sums)
SUM_CASES = [
    (0, 0, 40, F32, None),
    (3, 0, 40, BF16, None),
    (0, 6, 40, BF16, None),
    (1, 1, 1, F32, None),
    (1, 9, 40, F32, None),
    (4, 17, 40, F32, None),
    (4, 17, 40, BF16, None),
    (8, 12, 40, BF16, F32),
    (8, 12, 24, F16, F16),
    (3, 5, 256, F32, BF16),
    (3, 4, 1024, BF16, None),
    (6, 5, 1060, BF16, F32),
    (2, 3, 2051, F32, None),
]


def check_swiglu(device: str, rows: int, width: int, dtype: torch.dtype) -> None:
    grad, gate_up, weights = problem(device, rows, width, dtype)
    with guarded_outputs():
        hidden = kernels.swiglu(gate_up, weights)
    assert_close(hidden, plain_swiglu(gate_up.double(), weights.double()), dtype)


def check_swiglu_backward(device: str, rows: int, width: int, dtype: torch.dtype) -> None:
    grad, gate_up, weights = problem(device, rows, width, dtype)
    gate_up64, weights64 = gate_up.double().requires_grad_(), weights.double().requires_grad_()
    expected = plain_swiglu(gate_up64, weights64)
    expected.backward(grad.double())
    for want_hidden in (False, True):
        with guarded_outputs():
            got = kernels.swiglu_backward(grad, gate_up, weights, want_hidden)
        assert_close(got[0], gate_up64.grad, dtype)
        # A sum of F numbers errs by its largest, not by what is left of it.
        assert_close(got[1], weights64.grad, F32, size=10 * width**0.5)
        assert (got[2] is not None) == want_hidden
        if got[2] is not None:
            assert_close(got[2], expected.detach(), dtype)
            assert torch.equal(got[2], kernels.swiglu(gate_up, weights))
        again = kernels.swiglu_backward(grad, gate_up, weights, want_hidden)
        assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])


def check_expanded_gradient(device: str) -> None:
    _, gate_up, weights = problem(device, 5, 24, F32)
    one = torch.ones((), device=device)
    got = kernels.swiglu_backward(one.expand(5, 24), gate_up, weights, False)
    expected = kernels.swiglu_backward(torch.ones(5, 24, device=device), gate_up, weights, False)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def check_segment_sum(
    device: str,
    most: int,
    num_sums: int,
    width: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> None:
    """Bit by bit: float32 sums in the one order, rounded once."""
    g = torch.Generator().manual_seed(most + num_sums + width)
    counts = torch.randint(most + 1, (num_sums,), generator=g)
    spare = 3  # rows that no segment names: they stay out
    total = int(counts.sum())
    order = torch.randperm(total + spare, generator=g)[:total]
    # sizes over several decades: another order gives other bits
    rows = torch.randn(total + spare, width, generator=g)
    rows = rows * 10 ** (4 * torch.rand(total + spare, 1, generator=g) - 2)
    rows, order, counts = rows.to(device, dtype), order.to(device), counts.to(device)
    rows, ends = between_nans(rows), counts.cumsum(0)
    with guarded_outputs():
        got = kernels.segment_sum(rows, order, ends, out_dtype)
    expected = torch.zeros(num_sums, width, device=device)
    for i in range(most):
        has_more = counts > i
        expected[has_more] += rows[order[(ends - counts)[has_more] + i]].float()
    assert got.dtype == (out_dtype or dtype)
    assert torch.equal(got, rounded(expected, got.dtype))


def problem(
    device: str, rows: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of hidden, gate_up and weights; among the gates some that saturate."""
    g = torch.Generator().manual_seed(rows + width)
    grad = torch.randn(rows, width, generator=g)
    gate_up = 2 * torch.randn(rows, 2 * width, generator=g)
    if rows:
        gate_up[0, : min(width, 4)] = torch.tensor([0.0, -30.0, 30.0, -200.0])[:width]
    weights = torch.rand(rows, generator=g)
    tensors = grad.to(device, dtype), gate_up.to(device, dtype), weights.to(device)
    return between_nans(tensors[0]), between_nans(tensors[1]), between_nans(tensors[2])


def plain_swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up * weights[:, None]


def rounded(sums: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == BF16 and INTERPRETED:
        sums = (sums.view(torch.int32) & -(2**16)).view(F32)
    return sums.to(dtype)


def assert_close(got: Tensor, expected: Tensor | None, dtype: torch.dtype, size: float = 1) -> None:
    """Off by one rounding to `dtype`, and by what float32 costs numbers of this size."""
    assert expected is not None and got.dtype == dtype
    rounding = torch.finfo(dtype).eps / (1 if dtype == BF16 and INTERPRETED else 2)
    torch.testing.assert_close(got.double(), expected, rtol=rounding + 1e-5, atol=5e-6 * size)


_MARGIN = 4096  # numbers on either side, more than a block


def between_nans(tensor: Tensor) -> Tensor:
    """The same numbers where a stray read finds NaN."""
    buffer = tensor.new_full((tensor.numel() + 2 * _MARGIN,), torch.nan)
    inside = buffer[_MARGIN : _MARGIN + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)


@contextmanager
def guarded_outputs() -> Iterator[None]:
    """Outputs start as NaN, so that a number not written shows, and stand between numbers that
    must stay, so that a stray one does."""
    real_empty, buffers = torch.empty, []

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        count = torch.Size(shape).numel()
        buffer = real_empty(count + 2 * _MARGIN, dtype=dtype, device=device).fill_(7)
        buffer[_MARGIN : _MARGIN + count] = torch.nan
        buffers.append(buffer)
        return buffer[_MARGIN : _MARGIN + count].view(shape)

    with mock.patch.object(torch, "empty", empty):
        yield
    assert buffers, "the outputs come from elsewhere now: guard them there"
    for buffer in buffers:
        assert (buffer[:_MARGIN] == 7).all() and (buffer[-_MARGIN:] == 7).all(), "stray write"


Check = tuple[Callable[..., None], tuple]
CHECKS: list[Check] = [
    *((check_swiglu, case) for case in SWIGLU_CASES),
    *((check_swiglu_backward, case) for case in SWIGLU_CASES),
    *((check_segment_sum, case) for case in SUM_CASES),
    (check_expanded_gradient, ()),
]
LARGE_CHECKS: list[Check] = [
    *((check_swiglu, (9001, width, BF16)) for width in (1024, 1408)),
    *((check_swiglu_backward, (9001, width, BF16)) for width in (1024, 1408)),
    (check_swiglu, (70001, 24, F32)),  # more rows than the other axes of a grid can have
    (check_swiglu_backward, (70001, 24, F32)),
    (check_segment_sum, (8, 5001, 2048, BF16, None)),
    (check_segment_sum, (64, 500, 2050, BF16, F32)),
    (check_segment_sum, (1, 70001, 40, F32, None)),
]


@needs_triton
def test_interpreted_on_the_cpu() -> None:
    assert interpreted("tests.moe.experts.test_kernels") == f"{len(CHECKS)} checks, 0 failed\n"


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_a_gpu(
    capability: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    for kernel, types in [
        (kernels._swiglu_kernel, ["*bf16", "*fp32", "*bf16"]),
        (
            kernels._swiglu_backward_kernel,
            ["*bf16", "*bf16", "*fp32", "*bf16", "*fp32", "*bf16"],
        ),
        (
            kernels._swiglu_backward_kernel,
            ["*bf16", "*bf16", "*fp32", "*bf16", "*fp32", "constexpr"],
        ),
        (kernels._segment_sum_kernel, ["*bf16", "*i64", "*i64", "*bf16"]),
        (kernels._segment_sum_kernel, ["*bf16", "*i64", "*i64", "*fp32"]),
    ]:
        signature = dict(
            zip(kernel.arg_names, [*types, "i32", "constexpr"], strict=True)  # width, BLOCK
        )
        constants = {n: None for n, kind in signature.items() if kind == "constexpr"}
        source = triton.compiler.ASTSource(
            kernel, signature, constexprs=constants | {"BLOCK": 1024}
        )
        options = {"num_warps": 4, "enable_fp_fusion": False}
        assert triton.compile(source, target=target, options=options).asm["cubin"]


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("check, case", CHECKS + LARGE_CHECKS)
def test_on_the_gpu(check: Callable[..., None], case: tuple) -> None:
    check("cuda", *case)


@pytest.mark.gpu
@on_gpu
def test_offsets_beyond_31_bits() -> None:
    rows, width = 1_100_000, 1024
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    gate_up = torch.zeros(rows, 2 * width, dtype=BF16, device="cuda")
    weights = torch.ones(rows, device="cuda")
    gate_up[-2:] = torch.randn(2, 2 * width, device="cuda")
    hidden = kernels.swiglu(gate_up, weights)
    assert not hidden[:-2].any()
    assert torch.equal(hidden[-2:], kernels.swiglu(gate_up[-2:], weights[-2:]))
    grads = kernels.swiglu_backward(torch.ones_like(hidden), gate_up, weights, False)
    last = kernels.swiglu_backward(torch.ones_like(hidden[-2:]), gate_up[-2:], weights[-2:], False)
    assert torch.equal(grads[0][-2:], last[0]) and torch.equal(grads[1][-2:], last[1])
    order = torch.arange(rows - 1, -1, -1, device="cuda")
    ends = torch.arange(1, rows + 1, device="cuda")
    assert torch.equal(kernels.segment_sum(gate_up, order, ends), gate_up.flip(0))


if __name__ == "__main__":
    sys.exit(run_checks(CHECKS) != 0)
