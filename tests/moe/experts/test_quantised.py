"""Weights in 8 and 4 bits: what they hold, and products that equal those of what they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gemoe_ds.moe.dispatch import LocalDispatcher
from gemoe_ds.moe.experts.module import Experts, QuantisedExperts
from gemoe_ds.moe.experts.quantised import FORMATS, NF4, QuantisedWeight, _float8
from tests.moe.oracle import dense_moe, dispatch, grads_of, ragged_problem

BITSANDBYTES = (
    "7effb30017efeb30017efeb30028efea30028efea30028efea30028efea30028"
    "efea30029efea20029efe920029efe920029efe920029efe92002aefe92003ae"
)
SCALES = [0.04987787455320358, 0.1499994695186615]


def whole(weight: QuantisedWeight, dtype: torch.dtype) -> torch.Tensor:
    return torch.stack([weight.dequantised(e, dtype) for e in range(weight.shape[0])])


def blocks_of(tensor: torch.Tensor, size: int) -> torch.Tensor:
    padded = nn.functional.pad(tensor, (0, -tensor.shape[-1] % size))
    return padded.reshape(*tensor.shape[:-1], -1, size)


@pytest.mark.parametrize("num_inputs", [1, 63, 64, 128])
@pytest.mark.parametrize("name", FORMATS)
def test_a_view_is_quantised_as_what_it_shows(name, num_inputs):
    """Stacks that are stored with inputs before outputs come as exchanged views."""
    weight = torch.randn(2, num_inputs, 150).mT
    found, plain = (QuantisedWeight.of(name, one) for one in (weight, weight.contiguous()))
    assert torch.equal(found.codes_EMC, plain.codes_EMC)
    assert torch.equal(found.scales_EMB, plain.scales_EMB)


@pytest.mark.parametrize("num_inputs", [1, 63, 64, 128, 200, 256])
@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_is_as_near_as_its_format_can_be(name, num_inputs):
    """To the nearest level of its block, whatever the size of the numbers in it."""
    torch.manual_seed(num_inputs)
    weight = torch.randn(3, 150, num_inputs) * 10.0 ** torch.randint(-6, 3, (3, 150, 1))
    weight[1, 2] = 0
    found = QuantisedWeight.of(name, weight)
    there = whole(found, torch.float32)
    assert there.shape == found.shape == weight.shape
    assert not there[1, 2].any()
    most = blocks_of(weight, FORMATS[name].block).abs().amax(-1, keepdim=True)
    if name == "float8":  # 128 rows have a scale together
        parts = most.split(128, dim=1)
        most = torch.cat([part.amax(1, keepdim=True).expand_as(part) for part in parts], 1)
    error = (blocks_of(there, FORMATS[name].block) - blocks_of(weight, FORMATS[name].block)).abs()
    size = blocks_of(weight, FORMATS[name].block).abs()
    worst = {
        "int8": most / 127 * 0.5,
        "float8": torch.maximum(size * 2.0**-4, most / 448 * 2.0**-10),
        "nf4": most * max(b - a for a, b in zip(NF4, NF4[1:], strict=False)) / 2,
    }[name]
    assert (error <= worst * 1.00001).all()
    kept = (size == most) & (most > 0)
    found_there = blocks_of(there, FORMATS[name].block).abs()
    assert torch.allclose(found_there[kept], size[kept]), "the largest of a block is kept"
    stored = found.codes_EMC.nbytes + found.scales_EMB.nbytes
    assert stored == FORMATS[name].num_bytes(3 * 150, num_inputs)
    assert not found.state_dict()


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_dequantised_stays_as_it_is(name):
    there = whole(QuantisedWeight.of(name, torch.randn(2, 9, 128)), torch.float32)
    again = whole(QuantisedWeight.of(name, there), torch.float32)
    assert torch.allclose(again, there, rtol=1e-6, atol=0)


def test_a_product_s_dtype_rounds_once():
    for name in FORMATS:
        weight = QuantisedWeight.of(name, torch.randn(2, 300, 128))
        exact = whole(weight, torch.float32)
        assert torch.equal(whole(weight, torch.bfloat16), exact.to(torch.bfloat16))
        assert torch.equal(whole(weight, torch.float64), exact.to(torch.float64))


def test_nf4_is_the_nearest_level_around_every_middle():
    levels = torch.tensor(NF4)
    middles = (levels[1:] + levels[:-1]) / 2
    near = [middles, *(torch.nextafter(middles, torch.tensor(end)) for end in (-2.0, 2.0))]
    numbers = torch.cat([*near, levels, torch.linspace(-1, 1, 4097)])
    codes = FORMATS["nf4"].encode(nn.functional.pad(numbers, (0, numbers.numel() % 2))[None])
    found = torch.stack([codes >> 4, codes & 15], -1).flatten()[: numbers.numel()]
    assert torch.equal(found, (numbers[:, None] > middles).sum(1).to(torch.uint8))


def test_nf4_is_that_of_bitsandbytes():
    """Codes and scales of bitsandbytes 0.50.2: `quantize_4bit(weight, blocksize=64)`."""
    weight = torch.sin(torch.arange(128, dtype=torch.float32) * 0.7).view(1, 1, 128) * 0.05
    weight[..., 64:] *= 3
    found = QuantisedWeight.of("nf4", weight)
    codes = bytes(found.codes_EMC.flatten().tolist()).hex()
    assert codes == BITSANDBYTES
    assert found.scales_EMB.flatten().tolist() == pytest.approx(SCALES, rel=1e-7)


def test_every_float8_is_read_as_torch_reads_it():
    codes = torch.arange(256, dtype=torch.uint8)
    wanted = codes.view(torch.float8_e4m3fn).to(torch.float32)
    for order in (codes, codes.flip(0), codes.roll(1)):
        found = torch.empty(1, 256)
        _float8(order[None], found)
        found = found[0]
        index = order.long()
        assert torch.equal(found.nan_to_num(), wanted[index].nan_to_num())
        assert torch.equal(found.isnan(), wanted[index].isnan())


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_the_dequantised_weights(name, density):
    """Against the dense sum over all experts in float64, outputs and gradients."""
    x, mask, weights, gate_up, down = ragged_problem(4, 40, 6, density)
    mask[:, 2] = False  # idle
    parts = [QuantisedWeight.of(name, one.detach().float()) for one in (gate_up, down)]
    frozen = [whole(one, torch.float64) for one in parts]
    layer = QuantisedExperts(*parts)
    assert layer.num_experts == 6 and not list(layer.parameters()) and not layer.state_dict()
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        inputs = [one.detach().to(dtype).requires_grad_() for one in (x, weights)]
        got = dispatch(LocalDispatcher(), inputs[0], mask, inputs[1], layer)
        assert got.dtype == dtype
        exact = [one.detach().double().requires_grad_() for one in (x, weights)]
        want = dense_moe(exact[0], mask, exact[1], *frozen)
        upstream = torch.randn_like(want)
        have = [got, *grads_of((got * upstream.to(dtype)).sum(), inputs)]
        for a, b in zip(have, [want, *grads_of((want * upstream).sum(), exact)], strict=True):
            assert (a.double() - b).norm() <= bound * b.norm() + 1e-30


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 40])
def test_under_autocast_they_are_those_of_rounded_weights(name, rows):
    """The frozen layer of the same numbers in bfloat16, to its last bit or two."""
    x, mask, weights, gate_up, down = ragged_problem(4, rows, 6, 0.5)
    parts = [QuantisedWeight.of(name, one.detach().float()) for one in (gate_up, down)]
    plain = Experts(*(whole(one, torch.bfloat16) for one in parts), trainable=False)
    found = []
    for layer in (QuantisedExperts(*parts), plain):
        inputs = [one.detach().float().requires_grad_() for one in (x, weights)]
        with torch.autocast("cpu", torch.bfloat16):
            out = dispatch(LocalDispatcher(), inputs[0], mask, inputs[1], layer)
        found.append([out, *grads_of(out.sum(), inputs)])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 0.01 * b.norm()
