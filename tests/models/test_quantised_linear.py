"""`model.dense_dtype`: linear maps in few bits, and products of what they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from gemoe_ds.models import quantised_linear
from gemoe_ds.models.quantised_linear import QuantisedLinear, linear_maps, quantise_linear_maps
from gemoe_ds.moe.experts.quantised import FORMATS
from gemoe_ds.moe.router import Router
from tests.routers.cases import SPEC, make_router


def quantised(name: str, linear: nn.Linear) -> QuantisedLinear:
    model = nn.Sequential(linear)
    assert quantise_linear_maps(model, name, torch.float32) == {}
    (found,) = model
    assert isinstance(found, QuantisedLinear) and found.bias is linear.bias
    return found


@pytest.mark.parametrize("at_once", [2**24, 1000])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_it_is_the_map_of_the_dequantised_weight(name, bias, at_once, monkeypatch):
    """Output and the gradient of x, whole and some rows at a time."""
    monkeypatch.setattr(quantised_linear, "_AT_ONCE", at_once)
    torch.manual_seed(0)
    found = quantised(name, nn.Linear(100, 70, bias=bias))
    twin = nn.Linear(100, 70, bias=bias)
    twin.weight.data, twin.bias = found.weight, found.bias
    twin.double()
    for shape in ((3, 5, 100), (1, 100), (0, 100)):
        x = torch.randn(shape, requires_grad=True)
        exact = x.detach().double().requires_grad_()
        y, wanted = found(x), twin(exact)
        upstream = torch.randn_like(wanted)
        for a, b in (
            (y, wanted),
            (
                *torch.autograd.grad((y * upstream.float()).sum(), x),
                *torch.autograd.grad((wanted * upstream).sum(), exact),
            ),
        ):
            assert a.dtype == torch.float32 and a.shape == b.shape
            assert (a.double() - b).norm() <= 1e-6 * b.norm()


def test_under_autocast_it_is_a_linear_map_in_bfloat16():
    found = quantised("int8", nn.Linear(128, 128))
    twin = nn.Linear(128, 128)
    twin.weight.data, twin.bias = found.weight, found.bias
    x = torch.randn(7, 128)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = found(x), twin(x)
    assert a.dtype == b.dtype == torch.bfloat16
    assert (a.float() - b.float()).norm() <= 0.01 * b.float().norm()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(90, 80), nn.Linear(80, 90, bias=False)
        self.head.weight = self.embed.weight
        self.small, self.large = nn.Linear(80, 2), nn.Linear(80, 80)


def test_what_is_an_embedding_too_or_small_stays():
    assert linear_maps(Tied()).keys() == {"large"}


@pytest.mark.parametrize("name", Router.names())
def test_no_router_s_map_is_quantised(name):
    router = make_router(name, {}, replace(SPEC, d_model=64, num_experts=32))
    assert not linear_maps(nn.ModuleList([router]))
