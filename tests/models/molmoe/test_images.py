"""MolmoE's images: published counts; crops and features put back together give the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gemoe_ds.models.molmoe.images import CLIP_MEAN, CLIP_STD, MolmoeImages
from tests.models.small import noise

LAYOUT = MolmoeImages()


@pytest.mark.parametrize(
    "size, crops, tokens",
    [
        ((224, 224), 2, 316),
        ((336, 336), 2, 316),
        ((480, 640), 7, 748),
        ((300, 1200), 6, 732),
        ((640, 480), 7, 740),
        ((1024, 768), 13, 1196),
        ((1920, 1080), 13, 1196),
        ((2000, 2000), 10, 972),
    ],
)
def test_published_counts(size, crops, tokens):
    image = LAYOUT(Image.new("RGB", size))
    assert (len(image.pixels), len(image.input_ids)) == (crops, tokens)
    assert image.num_features == 144 * crops


@pytest.mark.parametrize(
    "size, tiling, tokens",
    [
        ((224, 224), (1, 1), 316),
        ((1024, 768), (3, 5), 1420),
        ((1920, 1080), (4, 8), 2644),
        ((2000, 2000), (6, 6), 2916),
        ((3000, 500), (2, 13), 2340),
    ],
)
def test_in_36_crops_as_molmos_own_evaluation_cuts_them(size, tiling, tokens):
    """Tilings of select_tiling in olmo/data/model_preprocessor.py of allenai/molmo."""
    layout = MolmoeImages(max_crops=36)
    assert layout.tiling(size[1], size[0]) == tiling and layout.num_tokens(*size) == tokens


def test_the_tokens_of_one_picture():
    """640 x 480: 704 patches; a start, an end and a column mark for each row, twice."""
    ids = LAYOUT(Image.new("RGB", (640, 480))).input_ids
    assert ids.count(50282) == 704 and ids[:13] == [50280, *[50282] * 12]
    assert ids[13] == 50283 and ids[157] == 50281 and ids[158] == 50280 and ids[-1] == 50281
    assert ids.count(50283) == 12 + 20


@pytest.mark.parametrize("size", [(1, 1), (5000, 3), (3, 5000), (112, 112), (400, 100)])
def test_degenerate_pictures_are_one_crop_and_the_view(size):
    image = LAYOUT(noise(*size))
    assert image.pixels.shape == (2, 3, 336, 336) and np.isfinite(image.pixels).all()


def fitted_by_hand(image: Image.Image, high: int, wide: int) -> np.ndarray:
    """Resized to fit, in the middle of black, normalised: [3, high, wide] and where it is."""
    picture = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    # The published rule rounds to single precision before it cuts off: 97 pixels enlarged to 336
    # can become 335.
    scale = min(np.float32(high) / np.float32(image.height), np.float32(wide) / image.width)
    inner = [int(np.float32(side) * np.float32(scale)) for side in (image.height, image.width)]
    small = torch.nn.functional.interpolate(
        picture, size=inner, mode="bilinear", align_corners=False, antialias=True
    )
    canvas = torch.zeros(3, high, wide)
    top, left = (high - inner[0]) // 2, (wide - inner[1]) // 2
    canvas[:, top : top + inner[0], left : left + inner[1]] = small[0].clamp(0, 1)
    inside = torch.zeros(high, wide)
    inside[top : top + inner[0], left : left + inner[1]] = 1
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return ((canvas - mean) / std).numpy(), inside.numpy()


@settings(max_examples=15, deadline=None)
@given(st.integers(60, 900), st.integers(60, 900))
def test_crops_features_and_masks_against_loops(width, height):
    picture = noise(width, height)
    image = LAYOUT(picture)
    rows, columns = LAYOUT.tiling(height, width)
    small, _ = fitted_by_hand(picture, 336, 336)
    np.testing.assert_allclose(image.pixels[0], small, atol=1e-5)
    large, inside = fitted_by_hand(picture, rows * 224 + 112, columns * 224 + 112)
    shares, number = [], 0
    for y in range(rows):
        for x in range(columns):
            here = (slice(224 * y, 224 * y + 336), slice(224 * x, 224 * x + 336))
            number += 1
            np.testing.assert_allclose(image.pixels[number], large[(slice(None), *here)], atol=1e-5)
            shares.append(inside[here].reshape(24, 14, 24, 14).mean((1, 3)).ravel())
    # the published order: local masks first, then a crop of -1
    expected = np.stack([*shares, np.full(576, -1.0)])
    np.testing.assert_allclose(image.extras["mask"], expected, atol=1e-6)
    check_features(image, rows, columns)


def check_features(image, rows: int, columns: int) -> None:
    """Each token's feature looks at the token's place in the picture, and none is used twice."""
    feature = image.feature_P
    is_patch = np.array(image.input_ids) == 50282
    assert (feature[~is_patch] == -1).all()
    used = feature[is_patch].tolist()
    assert used[:144] == list(range(144))
    assert len(set(used)) == len(used) == 144 + (8 * rows + 4) * (8 * columns + 4)
    place = 144
    for y in range(8 * rows + 4):  # in steps of 28 pixels
        for x in range(8 * columns + 4):
            crop, inner = divmod(used[place] - 144, 144)
            crop_y, crop_x = divmod(crop, columns)
            inner_y, inner_x = divmod(inner, 12)
            assert (8 * crop_y + inner_y, 8 * crop_x + inner_x) == (y, x)
            place += 1


def best_tiling(height: int, width: int) -> tuple[int, int]:
    """By the words: least enlargement, else least shrinking; fewest crops, then fewest rows."""
    found = []
    for i in range(1, 13):
        for j in range(1, 12 // i + 1):
            scale = min(i * 224 / (height - 112), j * 224 / (width - 112))
            found.append((scale, i * j, i, j))
    enlarging = [f for f in found if f[0] >= 1]
    if enlarging:
        scale, _, i, j = min(enlarging, key=lambda f: (round(f[0], 5), f[1], f[2]))
    else:
        scale, _, i, j = min(found, key=lambda f: (-round(f[0], 5), f[1], f[2]))
    return i, j


@settings(max_examples=200, deadline=None)
@given(st.integers(113, 3000), st.integers(113, 3000))
def test_tiling_by_its_words(height, width):
    assert LAYOUT.tiling(height, width) == best_tiling(height, width)


def test_a_dummy_image_is_small():
    assert LAYOUT.dummy().num_features == 288
