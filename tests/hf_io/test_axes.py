"""`rearrange` equals einops', both ways; what does not fit is refused."""

import pytest
import torch
from einops import rearrange as einops_rearrange

from gemoe_ds.hf_io.axes import AxesError, rearrange

CASES = [
    ("1 n d -> n d", (1, 5, 3), {}),
    ("n d -> 1 n d", (5, 3), {}),
    ("d (y x c) -> d c y x", (4, 2 * 3 * 5), {"y": 2, "x": 3}),
    ("d c y x -> d (y x c)", (4, 5, 2, 3), {"y": 2, "x": 3}),
    ("i o -> o i", (2, 7), {}),
]


@pytest.mark.parametrize(("pattern", "shape", "sizes"), CASES)
def test_it_equals_einops(pattern, shape, sizes):
    tensor = torch.randn(shape)
    expected = einops_rearrange(tensor, pattern, **sizes)
    found = rearrange(tensor, pattern, **sizes)
    assert found.shape == expected.shape and torch.equal(found, expected)


@pytest.mark.parametrize(
    ("pattern", "shape", "sizes"),
    [
        ("1 n d -> n d", (2, 5, 3), {}),
        ("n d -> d n", (2, 5, 3), {}),
        ("d (y x c) -> d c y x", (4, 31), {"y": 2, "x": 3}),
        ("d (y x c) -> d c y x", (4, 30), {"y": 2}),
        ("i o -> o i", (2, 7), {"i": 3}),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(pattern, shape, sizes):
    with pytest.raises(AxesError, match="axes of|does not fit"):
        rearrange(torch.empty(shape, device="meta"), pattern, **sizes)
