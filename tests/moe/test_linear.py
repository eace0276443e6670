"""The router's linear map and oneDNN's equal the plain product, in value and gradients."""

from __future__ import annotations

import pytest
import torch

from gemoe_ds.moe import onednn
from gemoe_ds.moe.linear import RouterLinear


@pytest.mark.parametrize("rows", [0, 1, 256, 700])
@pytest.mark.parametrize("outputs", [1, 8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_router_linear_equals_the_plain_product(rows, outputs, dtype):
    torch.manual_seed(0)
    layer = RouterLinear(40, outputs)
    x = torch.randn(rows, 40).to(dtype).requires_grad_()
    probe = torch.randn(rows, outputs, dtype=torch.float64)
    got = layer(x)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    have = torch.autograd.grad((got * probe).sum(), [x, layer.weight])
    weight = layer.weight.detach().double().requires_grad_()
    wide = x.detach().double().requires_grad_()
    want = wide @ weight.t()
    want_grads = torch.autograd.grad((want * probe).sum(), [wide, weight])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    rough = (
        {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    )
    for a, b in zip(have, want_grads, strict=True):
        torch.testing.assert_close(a.double(), b, **rough)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onednn_means_what_its_name_says(dtype):
    """Private operations of torch: a new version that changes them must turn this red."""
    rows, weight = torch.randn(70, 48).to(dtype), torch.randn(24, 48).to(dtype)
    if not onednn.usable(rows):
        pytest.skip("this CPU has no oneDNN for it")
    want = rows.double() @ weight.double().t()
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 0.1}
    )
    for form in (weight, onednn.packed(weight)):
        torch.testing.assert_close(onednn.linear(rows, form).double(), want, **tolerance)
    assert onednn.linear(rows.t().contiguous().t(), weight).dtype == dtype
    assert not onednn.usable(rows.double())
