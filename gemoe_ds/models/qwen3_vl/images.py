"""Qwen3-VL's images: resized to a whole number of 2 x 2 patches, cut, framed by two tokens.

transformers' own processor does it, the one that needs Pillow and no torchvision. Shapes: P
positions in the sequence, N patches of 3 x 2 x 16 x 16 numbers (an image counts as two frames).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from gemoe_ds.models.images import ProcessedImage


@dataclass(frozen=True)
class Qwen3VLImages:
    """`<|vision_start|>`, a token for every 2 x 2 patches, `<|vision_end|>`."""

    processor: Any  # Qwen2VLImageProcessorPil
    image_id: int = 151655
    start_id: int = 151652
    end_id: int = 151653

    @property
    def token(self) -> tuple[str, int]:
        return "<|image_pad|>", self.image_id

    @property
    def settings(self) -> dict[str, Any]:
        """As published; all of it is read from the file."""
        half = [0.5] * 3
        return {"image_mean": half, "image_std": half, "patch_size": 16, "merge_size": 2}

    @property
    def frame(self) -> dict[str, int]:
        """The tokens beside that of features, by the ids that the model knows."""
        return {"<|vision_start|>": self.start_id, "<|vision_end|>": self.end_id}

    def __call__(self, rgb: Image.Image, num_images: int = 1) -> ProcessedImage:
        image = self.processor([_not_too_long(rgb)], return_tensors="np")
        pixels, grid = image["pixel_values"].astype(np.float32), image["image_grid_thw"]
        num_tokens = len(pixels) // self.processor.merge_size**2
        return ProcessedImage(
            [self.start_id, *[self.image_id] * num_tokens, self.end_id],
            np.array([-1, *range(num_tokens), -1]),
            num_tokens,
            pixels,
            {"grid_thw": grid.astype(np.int64)},
        )

    def num_tokens(self, width: int, height: int, num_images: int = 1) -> int:
        wide, high = _bounded(width, height)
        patches: int = self.processor.get_number_of_image_patches(high, wide)
        return patches // self.processor.merge_size**2 + 2

    def dummy(self) -> ProcessedImage:
        side = self.processor.patch_size * self.processor.merge_size
        return self(Image.new("RGB", (side, side)))


def _not_too_long(rgb: Image.Image) -> Image.Image:
    size = _bounded(*rgb.size)
    return rgb if size == rgb.size else rgb.resize(size)


def _bounded(width: int, height: int) -> tuple[int, int]:
    """An image at most 200 times as long as wide, which is all that the processor takes."""
    return max(width, -(-height // 200)), max(height, -(-width // 200))
