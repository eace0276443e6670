"""MoE-LLaVA's images: a square of CLIP's, padded."""

from __future__ import annotations

import numpy as np
from PIL import Image

import gemoe_ds.routers  # noqa: F401  (registers every router)
from gemoe_ds.models.moe_llava.images import PaddedSquare


def test_a_picture_stands_in_the_middle_of_clip_s_mean_colour():
    white = Image.new("RGB", (200, 100), (255, 255, 255))
    image = PaddedSquare()(white)
    assert image.pixels.shape == (1, 3, 336, 336) and len(image.input_ids) == 576
    mean, std = (np.array(values)[:, None, None] for values in PaddedSquare().settings.values())
    shown = np.rint((image.pixels[0] * std + mean) * 255)
    assert (shown[:, 100:236] == 255).all()
    assert (shown[:, :70] == np.array([122, 116, 104])[:, None, None]).all()
    assert (shown[:, 266:] == np.array([122, 116, 104])[:, None, None]).all()
