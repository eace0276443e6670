"""The kernel of the monotonic loss equals the CPU's way, which its own test holds to Eq. 12.

Interpreted in a process of its own, as tests/moe/experts/test_kernels.py says why:
`python -m tests.moe.test_monotonic_kernel`. It is compiled for GPUs as well, unrun.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from gemoe_ds.moe import monotonic
from gemoe_ds.moe.monotonic_kernel import BLOCK, _all_pairs_kernel, all_pairs
from tests.moe.experts.interpreter import interpreted

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
# (tokens, share of valid ones, values of H: 0 for all different, margin_constant, dtype)
CASES = [
    (0, 1.0, 0, 0.0, torch.float32),
    (1, 1.0, 0, 0.0, torch.float32),
    (5, 0.0, 0, 0.0, torch.float32),
    (63, 0.8, 4, 0.5, torch.float32),
    (64, 1.0, 0, 0.0, torch.float64),
    (65, 0.9, 0, -0.5, torch.float32),
    (200, 0.7, 9, 0.0, torch.float32),
    (333, 0.9, 0, 0.25, torch.float64),
]


def check(device: str, tokens: int, share: float, ties: int, constant: float, dtype) -> None:
    g = torch.Generator().manual_seed(tokens)
    entropy = torch.rand(tokens, generator=g, dtype=dtype) * 6
    k_soft = torch.rand(tokens, generator=g, dtype=dtype) * 7 + 1
    if ties:
        entropy, k_soft = (entropy * ties / 6).round(), k_soft.round()
    valid = torch.rand(tokens, generator=g) < share
    entropy, k_soft = (t.masked_fill(~valid, torch.nan) for t in (entropy, k_soft))
    if tokens > 40:
        entropy[7] = -0.0  # equals 0.0
        entropy[8] = 0.0
    given = entropy, k_soft, valid
    total, num_pairs, moved_T = all_pairs(*(t.to(device) for t in given), 1.2, constant)
    want_total, want_pairs, want_moved_T = monotonic.all_pairs(*given, 1.2, constant)
    assert num_pairs.item() == want_pairs.item()
    assert moved_T.tolist() == want_moved_T.tolist()
    torch.testing.assert_close(total.cpu(), want_total, rtol=1e-12, atol=1e-9)


@needs_triton
def test_interpreted_on_the_cpu() -> None:
    assert interpreted("tests.moe.test_monotonic_kernel") == f"{len(CASES)} checks\n"


@needs_triton
@pytest.mark.parametrize("capability", [75, 80, 90])
def test_compiles_for_a_gpu(
    capability: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    types = ["*fp32", "*fp32", "*i1", "*i32", "*fp64", "i32", "i32", *["constexpr"] * 3]
    signature = dict(zip(_all_pairs_kernel.arg_names, types, strict=True))
    constants = {"SLOPE": 1.2, "CONSTANT": 0.0, "BLOCK": BLOCK}
    source = triton.compiler.ASTSource(_all_pairs_kernel, signature, constexprs=constants)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    assert triton.compile(source, target=target, options=options).asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", [*CASES, (16_384, 0.9, 0, 0.0, torch.float32)])
def test_on_the_gpu(case: tuple) -> None:
    check("cuda", *case)


if __name__ == "__main__":
    for case in CASES:
        check("cpu", *case)
    print(f"{len(CASES)} checks")
