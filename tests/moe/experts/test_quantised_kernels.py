"""Products with quantised weights equal those of the dequantised ones, and compile for GPUs.

As in test_kernels.py: interpreted on the CPU in a process of their own (`python -m
tests.moe.experts.test_quantised_kernels`), on a GPU where there is one, and compiled here, unrun.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from gemoe_ds.moe.dispatch import LocalDispatcher
from gemoe_ds.moe.experts import ffn, grouped, quantised_kernels
from gemoe_ds.moe.experts.module import QuantisedExperts
from gemoe_ds.moe.experts.quantised import FORMATS, QuantisedWeight
from gemoe_ds.moe.triton_launch import triton
from tests.moe.experts.interpreter import bfloat16_as_on_a_gpu, interpreted, run_checks
from tests.moe.experts.test_kernels import (
    BF16,
    F32,
    Check,
    between_nans,
    guarded_outputs,
    needs_triton,
    on_gpu,
)
from tests.moe.oracle import dense_moe, dispatch, grads_of, ragged_problem

# (rows of each expert, spare rows, M, K, dtype): neither whole blocks nor whole tiles, and both
CASES = [
    ([0], 0, 5, 7, F32),
    ([0, 0, 0], 9, 40, 24, F32),
    ([1], 0, 1, 1, F32),
    ([0, 1, 0], 0, 24, 40, BF16),
    ([5, 0, 7, 3, 0], 0, 24, 65, F32),
    ([17, 0, 3, 16, 1, 0, 0, 40], 7, 131, 200, BF16),
    ([16, 16], 3, 128, 64, F32),
    ([129, 0, 200, 1], 0, 130, 129, BF16),
    ([0, 128, 0], 60, 128, 256, F32),
    ([300, 2], 30, 257, 63, BF16),
]


def check_products(
    device: str, name: str, counts: list[int], spare: int, m: int, k: int, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(m + k)
    ends = torch.tensor(counts).cumsum(0)
    weight, exact = problem(name, torch.randn(len(counts), m, k, generator=g), dtype, device)
    for product, width, dense in (
        (quantised_kernels.times_transposed, k, exact.mT),
        (quantised_kernels.times, m, exact),
    ):
        used = int(ends[-1])
        rows = torch.randn(used + spare, width, generator=g)
        rows[used:] = torch.nan
        rows = between_nans(rows.to(device, dtype))
        parts = rows[:used].cpu().double().split(counts)
        want = torch.cat([part @ one for part, one in zip(parts, dense, strict=True)])
        size = torch.cat([p.abs() @ one.abs() for p, one in zip(parts, dense, strict=True)])
        with guarded_outputs():
            got = product(rows, weight, ends.to(device, torch.int32))
        assert got.shape == (used + spare, dense.shape[2]) and got.dtype == dtype
        assert got[used:].isnan().all(), "spare rows are written"
        error = (got[:used].cpu().double() - want).abs()
        assert (error <= torch.finfo(dtype).eps / 2 * want.abs() + 3e-6 * size).all(), error.max()
        if device != "cpu":  # interpreted, programs run one after the other
            again = product(rows, weight, ends.to(device, torch.int32))
            assert torch.equal(got[:used], again[:used])


def problem(
    name: str, values: Tensor, dtype: torch.dtype, device: str
) -> tuple[QuantisedWeight, Tensor]:
    """The weight, where a stray read of its scales finds NaN; float64 of what it stands for."""
    torch.manual_seed(0)
    values *= 10.0 ** torch.randint(-1, 2, (*values.shape[:2], 1))
    weight = QuantisedWeight.of(name, values)
    exact = [weight.dequantised(e, dtype).double() for e in range(len(values))]
    weight.scales_EMB = between_nans(weight.scales_EMB.to(device))
    weight.codes_EMC = weight.codes_EMC.to(device)
    return weight, torch.stack(exact)


def check_every_code(device: str, name: str) -> None:
    """Bit by bit, each expert with a scale of its own; of float8 also what is no number."""
    weight = QuantisedWeight(name, (3, 1, 256 * 8 // FORMATS[name].bits))
    codes = torch.arange(256).to(torch.uint8).view(weight.format.codes)
    weight.codes_EMC[:] = torch.stack([codes, codes.flip(0), codes.roll(1)])[:, None]
    weight.scales_EMB[:] = torch.tensor([0.3, 2e-38, 7e30]).view(3, 1, 1)
    want = torch.cat([weight.dequantised(e, F32) for e in range(3)])
    ends = torch.arange(1, 4, dtype=torch.int32, device=device)
    ones = torch.ones(3, 1, device=device)
    got = quantised_kernels.times(ones, weight.to(device), ends).cpu()
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
    assert torch.equal(got.isnan(), want.isnan()) and want.isnan().any() == (name == "float8")


def check_layer(device: str, name: str, density: float, dtype: torch.dtype) -> None:
    """Outputs and gradients of all experts, with every kernel of the grouped path."""
    x, mask, weights, gate_up, down = ragged_problem(4, 40, 6, density, d=40, f=24)
    mask[:, 2] = False  # idle
    parts = [problem(name, one.detach().float() / 3, dtype, device) for one in (gate_up, down)]
    layer = QuantisedExperts(*(weight for weight, _ in parts))
    inputs = [x.detach().to(device, dtype), weights.detach().to(device, F32)]
    exact = [one.cpu().double().requires_grad_() for one in inputs]
    inputs = [one.requires_grad_() for one in inputs]
    with (
        patch.object(ffn, "available", lambda _: True),
        patch.object(grouped, "available", lambda _: True),
        patch.object(ffn, "path_for", lambda *_: grouped),
    ):
        got = dispatch(LocalDispatcher(), inputs[0], mask.to(device), inputs[1], layer)
        upstream = torch.randn_like(got)
        have = [got, *grads_of((got * upstream).sum(), inputs)]
    want = dense_moe(exact[0], mask, exact[1], *(one for _, one in parts))
    want = [want, *grads_of((want * upstream.cpu().double()).sum(), exact)]
    bound = 1e-5 if dtype == F32 else 0.01
    for a, b in zip(have, want, strict=True):
        assert (a.detach().cpu().double() - b).norm() <= bound * b.norm()


CHECKS: list[Check] = [
    *((check_products, (name, *case)) for name in FORMATS for case in CASES),
    *((check_every_code, (name,)) for name in FORMATS),
    *(
        (check_layer, (name, density, dtype))
        for name in FORMATS
        for density, dtype in ((0.2, F32), (0.6, BF16))
    ),
]
LARGE_CHECKS: list[Check] = [
    (check_products, (name, [900, 0, 3000, 1, 50], 9, 2048, 1408, BF16)) for name in FORMATS
]


@needs_triton
def test_interpreted_on_the_cpu() -> None:
    assert (
        interpreted("tests.moe.experts.test_quantised_kernels")
        == f"{len(CHECKS)} checks, 0 failed\n"
    )


@needs_triton
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_a_gpu(
    capability: int,
    name: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As it is launched for widths of 16 and more: with tensor cores."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernel = quantised_kernels._product_kernel
    codes, levels = "*i8" if name == "int8" else "*u8", "*fp32" if name == "nf4" else "constexpr"
    types = ["*bf16", codes, "*fp32", levels, "*i32", "*bf16", *["i32"] * 3, *["constexpr"] * 7]
    signature = dict(zip(kernel.arg_names, types, strict=True))
    aligned = {(i,): [["tt.divisibility", 16]] for i, one in enumerate(types) if one != "constexpr"}
    sizes = {"EXPERTS": 64, "M": quantised_kernels._M, "K": quantised_kernels._K}
    constants = {"FORMAT": name, "BLOCK": FORMATS[name].block} | sizes
    constants |= {} if name == "nf4" else {"levels_ptr": None}
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    options = {"num_warps": quantised_kernels._WARPS, "enable_fp_fusion": False}
    for transposed in (False, True):
        for rows in (quantised_kernels._FEW, quantised_kernels._MANY):
            chosen = constants | {"TRANSPOSED": transposed, "ROWS": rows}
            source = triton.compiler.ASTSource(kernel, signature, constexprs=chosen, attrs=aligned)
            compiled = triton.compile(source, target=target, options=options)
            assert compiled.asm["cubin"] and "mma" in compiled.asm["ptx"]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("check, case", CHECKS + LARGE_CHECKS)
def test_on_the_gpu(check: Callable[..., None], case: tuple) -> None:
    check("cuda", *case)


@pytest.mark.gpu
@on_gpu
def test_offsets_beyond_31_bits() -> None:
    """Of rows, of the result, and of codes: the last rows are the last expert's."""
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB")
    for num_rows, shape in ((1_100_000, (2, 2048, 2048)), (40, (18, 8192, 16384))):
        weight = QuantisedWeight("int8", shape).to("cuda")
        weight.codes_EMC.random_(-127, 128)
        weight.scales_EMB.uniform_(0.001, 0.01)
        last = QuantisedWeight("int8", (1, *shape[1:]))
        last.codes_EMC, last.scales_EMB = weight.codes_EMC[-1:], weight.scales_EMB[-1:]
        ends = torch.full(shape[:1], num_rows - 9, dtype=torch.int32, device="cuda")
        ends[-1] = num_rows
        for product, width in (
            (quantised_kernels.times_transposed, shape[2]),
            (quantised_kernels.times, shape[1]),
        ):
            rows = torch.zeros(num_rows, width, dtype=BF16, device="cuda")
            rows[-9:].normal_()
            got = product(rows, weight, ends)
            assert not got[:-9].any()
            want = product(rows[-9:], last, torch.full_like(ends[:1], 9))
            torch.testing.assert_close(got[-9:], want, rtol=0.01, atol=0.01)


if __name__ == "__main__":
    with bfloat16_as_on_a_gpu():
        sys.exit(run_checks(CHECKS) != 0)
