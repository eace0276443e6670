"""Qwen3-VL's images: token counts, and the order of every number against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.models.qwen3_vl.small import layout
from tests.models.small import noise


def wanted_size(width: int, height: int, low=65536, high=16777216) -> tuple[int, int]:
    """Multiples of 32 next to the size, within a number of pixels."""
    w, h = (round(side / 32) * 32 for side in (width, height))
    if w * h > high:
        scale = math.sqrt(width * height / high)
        return tuple(max(32, math.floor(s / scale / 32) * 32) for s in (width, height))
    if w * h < low:
        scale = math.sqrt(low / (width * height))
        return tuple(math.ceil(s * scale / 32) * 32 for s in (width, height))
    return w, h


@pytest.mark.parametrize(
    "size, tokens",
    [
        ((256, 256), 64),
        ((640, 480), 300),
        ((1024, 768), 768),
        ((1, 1), 64),
        ((5000, 4000), 143 * 114),
    ],
)
def test_tokens_of_an_image(size, tokens):
    """One token for 32 x 32 pixels of the resized image, between start and end."""
    image = layout()(Image.new("RGB", size))
    assert image.input_ids == [151652, *[151655] * tokens, 151653]
    assert image.num_features == tokens
    assert image.feature_P.tolist() == [-1, *range(tokens), -1]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400))
def test_every_number_where_the_tower_expects_it(width, height):
    if max(width, height) > 200 * min(width, height):
        return
    picture = noise(width, height)
    image = layout(size={"shortest_edge": 4096, "longest_edge": 65536})(picture)
    w, h = wanted_size(width, height, 4096, 65536)
    assert image.extras["grid_thw"].tolist() == [[1, h // 16, w // 16]]
    resized = np.asarray(picture.resize((w, h), Image.Resampling.BICUBIC), dtype=np.float64)
    values = (resized / 255 - 0.5) / 0.5
    row = 0
    for block_y in range(h // 32):
        for block_x in range(w // 32):
            for y in (2 * block_y, 2 * block_y + 1):
                for x in (2 * block_x, 2 * block_x + 1):
                    patch = values[16 * y : 16 * y + 16, 16 * x : 16 * x + 16]
                    frames = np.stack([patch.transpose(2, 0, 1)] * 2, axis=1)  # c, t, y, x
                    np.testing.assert_allclose(image.pixels[row], frames.ravel(), atol=1e-5)
                    row += 1
    assert row == len(image.pixels)


def test_a_stripe_is_widened_rather_than_refused():
    image = layout()(Image.new("RGB", (3000, 1)))
    assert image.num_features == len(image.pixels) // 4 > 0


def test_a_dummy_image_is_small():
    assert layout().dummy().num_features == 64
