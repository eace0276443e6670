"""DeepSeek-VL2's images: published counts; features stand where their piece of the picture is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gemoe_ds.models.deepseek_vl2.images import DeepseekVl2Images, resolutions
from tests.models.small import noise

LAYOUT = DeepseekVl2Images()


@pytest.mark.parametrize(
    "size, tokens",
    [((384, 384), 421), ((768, 384), 617), ((384, 768), 631), ((1152, 1152), 2017)],
)
def test_published_counts(size, tokens):
    image = LAYOUT(Image.new("RGB", size))
    assert image.input_ids == [128815] * tokens
    tiles = 1 + size[0] // 384 * (size[1] // 384)
    assert image.pixels.shape == (tiles, 3, 384, 384)
    assert image.num_features == 196 * tiles + 2 and image.extras["tiles"].tolist() == [tiles]


def test_more_than_two_images_are_not_cut_up():
    image = noise(1152, 1152)
    assert len(LAYOUT(image, num_images=2).pixels) == 10
    assert len(LAYOUT(image, num_images=3).input_ids) == 421


@pytest.mark.parametrize("size", [(1, 1), (5000, 3), (3, 5000)])
def test_degenerate_pictures(size):
    image = LAYOUT(noise(*size))
    assert np.isfinite(image.pixels).all() and image.feature_P.max() == image.num_features - 1


def test_resolution_in_the_published_order():
    assert len(resolutions(384)) == 23
    assert resolutions(384)[7] == (768, 768) and resolutions(384)[-1] == (1152, 1152)
    assert LAYOUT.best_resolution(384, 384) == (384, 384)
    assert LAYOUT.best_resolution(100, 100) == (384, 384)  # all keep everything: least waste
    assert LAYOUT.best_resolution(4000, 1000) == (1536, 384)
    assert LAYOUT.best_resolution(1000, 8000) == (384, 3072)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000))
def test_resolution_by_its_words(width, height):
    """Most effective pixels, then least waste, then the earlier one."""
    rated = []
    for place, (wide, high) in enumerate(resolutions(384)):
        scale = min(wide / width, high / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        rated.append((-effective, wide * high - effective, place, (wide, high)))
    assert LAYOUT.best_resolution(width, height) == min(rated)[-1]


def placed(image: Image.Image, wide: int, high: int) -> np.ndarray:
    """Fitted into the middle of grey, in [-1, 1]: [high, wide, 3]"""
    scale = min(wide / image.width, high / image.height)
    if image.width / image.height > wide / high:
        size = (wide, round(image.height / image.width * wide))
    else:
        size = (round(image.width / image.height * high), high)
    assert abs(size[0] - image.width * scale) <= 1 and abs(size[1] - image.height * scale) <= 1
    inner = image.resize(size, Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (wide, high), (127, 127, 127))
    canvas.paste(inner, (round((wide - size[0]) * 0.5), round((high - size[1]) * 0.5)))
    return np.asarray(canvas, dtype=np.float32) / 127.5 - 1


@settings(max_examples=15, deadline=None)
@given(st.integers(60, 900), st.integers(60, 900))
def test_tiles_and_features_against_loops(width, height):
    picture = noise(width, height)
    image = LAYOUT(picture)
    wide, high = LAYOUT.best_resolution(width, height)
    small, large = placed(picture, 384, 384), placed(picture, wide, high)
    np.testing.assert_allclose(image.pixels[0], small.transpose(2, 0, 1), atol=1e-5)
    columns, rows = wide // 384, high // 384
    for y in range(rows):
        for x in range(columns):
            tile = large[384 * y : 384 * y + 384, 384 * x : 384 * x + 384]
            np.testing.assert_allclose(
                image.pixels[1 + y * columns + x], tile.transpose(2, 0, 1), atol=1e-5
            )
    newline = 196 * (1 + rows * columns)
    expected = []
    for y in range(14):
        expected += [14 * y + x for x in range(14)] + [newline]
    expected.append(newline + 1)
    for y in range(14 * rows):
        for x in range(14 * columns):
            tile = 1 + y // 14 * columns + x // 14
            expected.append(196 * tile + y % 14 * 14 + x % 14)
        expected.append(newline)
    assert image.feature_P.tolist() == expected


def test_a_dummy_image_is_small():
    assert len(LAYOUT.dummy().input_ids) == 421
