"""oneDNN's products equal the plain ones."""

from __future__ import annotations

import pytest
import torch

from gemoe_ds.moe.experts import onednn


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
