"""The router's linear map equals the plain product, in value and gradients."""

from __future__ import annotations

import pytest
import torch

from gemoe_ds.moe.linear import RouterLinear, fused_linear


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


@pytest.mark.parametrize("is_partitioned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_is_each_of_them(dtype, is_partitioned):
    torch.manual_seed(0)
    layers = [RouterLinear(40, outputs) for outputs in (64, 8, 1)]
    if is_partitioned:  # as ZeRO 3 marks it
        layers[1].weight.ds_id = 0
    x = torch.randn(700, 40).to(dtype).requires_grad_()
    inputs = [x, *(layer.weight for layer in layers)]
    probes = [torch.randn(700, layer.out_features) for layer in layers]
    both = []
    for outputs in (fused_linear(x, *layers), [layer(x) for layer in layers]):
        total = sum((y * probe).sum() for y, probe in zip(outputs, probes, strict=True))
        both.append([*outputs, *torch.autograd.grad(total, inputs)])
    rough = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for i, (have, want) in enumerate(zip(*both, strict=True)):
        tolerance = rough if i == len(layers) else 1e-4  # x's gradient has x's dtype
        torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("used", [(), (0,), (0, 2), (1, 2)])
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)])
def test_what_is_not_used_or_does_not_train_has_no_gradient(used, frozen):
    torch.manual_seed(0)
    layers = [RouterLinear(40, outputs) for outputs in (64, 8, 1)]
    for n in frozen:
        layers[n].weight.requires_grad_(False)
    x = torch.randn(70, 40, requires_grad=True)
    inputs = [x, *(layer.weight for layer in layers if layer.weight.requires_grad)]
    both = []
    for outputs in (fused_linear(x, *layers), [x @ layer.weight.t() for layer in layers]):
        total = x.sum() + sum((outputs[n] ** 2).sum() for n in used)
        both.append(torch.autograd.grad(total, inputs, allow_unused=True))
    for have, want in zip(*both, strict=True):
        assert (have is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
