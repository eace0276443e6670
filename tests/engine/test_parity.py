"""Every combination of the engine equals plain single-process PyTorch; see parity.py."""

from __future__ import annotations

from tests.engine.parity import Case, is_equal, references, run_cases
from tests.helpers import run_ranks

CASES = [  # on two ranks; `make parity` runs all of them on four
    Case(0, ep_size=2, train="all"),
    Case(1, ep_size=2),
    Case(1, ep_size=2, train="all", accumulation=2),
    Case(2, ep_size=1, accumulation=2, clip=None),
    Case(2, ep_size=2, accumulation=2, recompute=True),
    Case(2, offload=True, ep_size=2, train="all"),
    Case(2, ep_size=2, router="top_k", clip=1.0),
    Case(3, ep_size=2),
    Case(3, ep_size=2, train="all", accumulation=2, recompute=True),
    Case(3, offload=True, ep_size=1, train="all"),
    Case(0, ep_size=2, distill="answers", gate_gradient="dense"),
    Case(3, ep_size=2, train="all", recompute=True, gate_gradient="dense"),
    Case(2, ep_size=1, accumulation=2, distill="all"),
    Case(3, ep_size=2, accumulation=2, recompute=True, distill="text"),
    Case(2, ep_size=2, dtype="bfloat16", router="top_k"),
    Case(3, ep_size=2, train="all", dtype="bfloat16", router="top_k"),
]


def test_two_ranks_equal_the_reference(base):
    """Loss, every gradient, the norm before clipping, and the weights after three steps."""
    expected = references(base, CASES, 2)
    by_rank = run_ranks(run_cases, 2, base, CASES, expected, timeout=240)
    failed = [
        f"{case}: {errors}"
        for results in by_rank
        for case, errors in zip(CASES, results, strict=True)
        if not is_equal(case, errors)
    ]
    assert not failed, "\n".join(failed)
