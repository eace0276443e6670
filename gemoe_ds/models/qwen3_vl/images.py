"""Qwen3-VL's images: resized to a whole number of 2 x 2 patches, cut, framed by two tokens.

transformers' own processor does it, the one that needs Pillow and no torchvision. Shapes: P
positions in the sequence, N patches of 3 x 2 x 16 x 16 numbers (an image counts as two frames),
F features (2 x 2 patches each); a batch has B sequences of S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from gemoe_ds.models.images import ProcessedImage


@dataclass(frozen=True)
class Qwen3VLImages:
    """`<|vision_start|>`, a token for every 2 x 2 patches, `<|vision_end|>`."""

    processor: Any  # Qwen2VLImageProcessorPil
    image_id: int = 151655
    start_id: int = 151652
    end_id: int = 151653
    position_side: int = 48  # rows and columns of the tower's learned positions

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
        merge = self.processor.merge_size
        num_tokens = len(pixels) // merge**2
        looked_up = tables(torch.from_numpy(grid).long(), self.position_side, merge)
        return ProcessedImage(
            [self.start_id, *[self.image_id] * num_tokens, self.end_id],
            np.array([-1, *range(num_tokens), -1]),
            num_tokens,
            pixels,
            {name: table.numpy() for name, table in looked_up.items()},
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


def tables(grid_13: Tensor, position_side: int, merge: int = 2) -> dict[str, Tensor]:
    """What the model looks up for each patch and feature of an image of so many patches (t, h, w).

    Worked out here, where the grid is: from a GPU the host would have to fetch it, and wait.
    """
    indices_N4, weights_N4 = get_vision_interpolation_indices_and_weights(
        grid_13, position_side, align_corners=True, spatial_merge_size=merge
    )
    _, high, wide = (grid_13[0] // merge).tolist()
    place_F3 = torch.zeros(high * wide, 3, dtype=torch.int64)
    place_F3[:, 0] = torch.arange(high).repeat_interleave(wide)
    place_F3[:, 1] = torch.arange(wide).repeat(high)
    place_F3[-1, 2] = max(high, wide)  # behind the image positions go on from its longer side
    return {
        "grid_thw": grid_13,
        "interp_indices": indices_N4,
        "interp_weights": weights_N4,
        "patch_position": get_vision_position_ids(grid_13, merge),
        "place_F3": place_F3,
    }


def rotary_positions(feature_BS: Tensor, is_valid_BS: Tensor, place_F3: Tensor) -> Tensor:
    """Time, row and column of every position, int64 [3, B, S] (M-RoPE); 0 where it is padding.

    Text counts 0, 1, ...; an image stands in one place of time, its rows and columns count from
    there. On the device, without a wait: transformers' own goes through it position by position.
    """
    is_image_BS = feature_BS >= 0
    place_3BS = place_F3[feature_BS.clamp(min=0)].permute(2, 0, 1)
    row_BS, column_BS, advance_BS = torch.where(is_image_BS, place_3BS, 0)
    advance_BS = torch.where(is_image_BS, advance_BS, is_valid_BS.long())
    start_BS = advance_BS.cumsum(1) - advance_BS
    return torch.stack([start_BS, start_BS + row_BS, start_BS + column_BS]) * is_valid_BS
