"""MoE-LLaVA's images: padded to a square, one tile, its patches in the place of `<image>`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from gemoe_ds.models.images import ProcessedImage
from gemoe_ds.models.molmoe.images import CLIP_MEAN, CLIP_STD

_GREY = (122, 116, 104)  # CLIP's mean colour


@dataclass(frozen=True)
class PaddedSquare:
    """CLIP's preprocessing of a picture on a square of its mean colour."""

    size: int = 336
    patch: int = 14

    @property
    def token(self) -> None:
        """None: `<image>` is no token of these models, features stand for themselves."""
        return None

    @property
    def settings(self) -> dict[str, Any]:
        """What preprocessor_config.json would say of what is built in here."""
        return {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}

    def __call__(self, rgb: Image.Image, num_images: int = 1) -> ProcessedImage:
        side = max(rgb.size)
        square = Image.new("RGB", (side, side), _GREY)
        square.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
        square = square.resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels_HWC = np.asarray(square, dtype=np.float32) / 255
        pixels_HWC -= np.array(CLIP_MEAN, np.float32)
        pixels_HWC /= np.array(CLIP_STD, np.float32)
        tokens = self.num_tokens(*rgb.size)
        return ProcessedImage(
            [0] * tokens,
            np.arange(tokens),
            tokens,
            np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)[None]),
        )

    def num_tokens(self, width: int, height: int, num_images: int = 1) -> int:
        return (self.size // self.patch) ** 2

    def dummy(self) -> ProcessedImage:
        return self(Image.new("RGB", (self.size, self.size)))
