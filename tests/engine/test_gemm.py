"""The grouped products equal a loop, and each GPU gets the one that suits it."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from gemoe_ds.engine.gemm import TritonGroupedGemm, grouped_gemm
from gemoe_ds.moe.experts.grouped_gemm import (
    IDLE_MASKED,
    TORCH,
    GroupedGemm,
    IdleMaskedGroupedGemm,
)


class Loop(GroupedGemm):
    """The obvious one."""

    def times(self, rows, weight, ends):
        return torch.cat([r @ w for r, w in zip(self._parts(rows, ends), weight, strict=True)])

    def times_transposed(self, rows, weight, ends):
        return self.times(rows, weight.mT, ends)

    def weight_grad(self, grad, rows, ends):
        pairs = zip(self._parts(grad, ends), self._parts(rows, ends), strict=True)
        return torch.stack([g.t() @ r for g, r in pairs])

    @staticmethod
    def _parts(rows, ends):
        return rows.split(ends.diff(prepend=ends.new_zeros(1)).tolist())


def compare(gemm, device, dtype, tolerance):
    g = torch.Generator().manual_seed(0)
    for counts in ([5, 0, 7, 3], [0, 0, 0, 9], [64, 1, 130, 0]):
        ends = torch.tensor(counts).cumsum(0).to(device, torch.int32)
        rows, grad = (torch.randn(sum(counts), n, generator=g).to(device, dtype) for n in (32, 48))
        weight = torch.randn(4, 48, 32, generator=g).to(device, dtype)
        for have, want in (
            (
                gemm.times_transposed(rows, weight, ends),
                Loop().times_transposed(rows, weight, ends),
            ),
            (gemm.times(grad, weight, ends), Loop().times(grad, weight, ends)),
            (gemm.weight_grad(grad, rows, ends), Loop().weight_grad(grad, rows, ends)),
        ):
            torch.testing.assert_close(have, want, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_equals_loop(dtype):
    compare(TORCH, "cpu", dtype, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(
    ("capability", "kind"),
    [
        ((8, 0), TritonGroupedGemm),
        ((8, 9), TritonGroupedGemm),
        ((9, 0), GroupedGemm),
        ((10, 0), IdleMaskedGroupedGemm),
        ((10, 3), IdleMaskedGroupedGemm),
        ((11, 0), TritonGroupedGemm),
        ((12, 0), TritonGroupedGemm),
    ],
)
def test_choice_by_capability(capability, kind):
    with patch("torch.cuda.get_device_capability", return_value=capability):
        assert type(grouped_gemm(torch.device("cuda"))) is kind
    assert grouped_gemm(torch.device("cpu")) is TORCH


def test_idle_experts_learn_nothing_where_the_product_leaves_something_there():
    ends = torch.tensor([5, 5, 9, 9], dtype=torch.int32)
    g = torch.Generator().manual_seed(0)
    rows, grad = (torch.randn(9, n, generator=g) for n in (32, 48))
    want = Loop().weight_grad(grad, rows, ends)
    dirty = want.masked_fill((want == 0).all(2).all(1)[:, None, None], torch.nan)
    with patch.object(GroupedGemm, "weight_grad", lambda *_: dirty):
        torch.testing.assert_close(IDLE_MASKED.weight_grad(grad, rows, ends), want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("gemm", [TORCH, IDLE_MASKED, TritonGroupedGemm()])
def test_on_a_gpu(gemm):
    compare(gemm, "cuda", torch.bfloat16, 2e-2)
