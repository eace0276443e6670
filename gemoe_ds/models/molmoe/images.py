"""MolmoE's images: overlapping crops of 336 x 336 pixels behind one small view of everything.

The picture is fitted into i x j windows of 224 pixels with a margin of 56 all around; every crop
sees its window and the margins, but only the inner part of its features is used where crops
overlap. Shapes: N crops, the global view first; P positions in the sequence; a crop has 24 x 24
patches, which the model pools to 12 x 12 features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from gemoe_ds.models.images import ProcessedImage

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class MolmoeImages:
    """`<im_start>`, rows of `<im_patch>` and `<im_col>`, `<im_end>`: global view, then crops."""

    patch: int = 14  # pixels
    crop: int = 24  # patches a side
    margin: int = 4  # patches on each side of a crop that neighbours see too
    max_crops: int = 12  # beside the global one
    start_id: int = 50280
    end_id: int = 50281
    patch_id: int = 50282
    column_id: int = 50283

    @property
    def settings(self) -> dict[str, Any]:
        """What preprocessor_config.json would say of what is built in here."""
        return {
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
            "base_image_input_size": [self.crop * self.patch] * 2,
            "image_patch_size": self.patch,
            "image_token_length_h": self.pooled,
            "image_token_length_w": self.pooled,
            "max_crops": self.max_crops,
            "overlap_margins": [self.margin] * 2,
        }

    @property
    def frame(self) -> dict[str, int]:
        """The tokens beside that of features, by the ids that the model knows."""
        return {
            "<im_start>": self.start_id,
            "<im_end>": self.end_id,
            "<im_col>": self.column_id,
        }

    @property
    def token(self) -> tuple[str, int]:
        return "<im_patch>", self.patch_id

    @property
    def window(self) -> int:
        """Patches a side that are a crop's own."""
        return self.crop - 2 * self.margin

    @property
    def pooled(self) -> int:
        """Features a side."""
        return self.crop // 2

    def __call__(self, rgb: Image.Image, num_images: int = 1) -> ProcessedImage:
        image_HWC = torch.from_numpy(np.array(rgb, dtype=np.float32) / 255)
        rows, columns = self.tiling(*image_HWC.shape[:2])
        small, _ = self._fitted(image_HWC, self.crop * self.patch, self.crop * self.patch)
        high, wide = ((n * self.window + 2 * self.margin) * self.patch for n in (rows, columns))
        large, inside = self._fitted(image_HWC, high, wide)
        places = [(y, x) for y in range(rows) for x in range(columns)]
        crops = np.stack([small, *(self._cut(large, *place) for place in places)])
        masks = [self._per_patch(self._cut(inside, *place)) for place in places]
        # As published, and as the model was trained: the masks of the local crops stand one crop
        # too early, and the last crop counts as partly padded (-1) everywhere.
        masks.append(np.full(self.crop**2, -1, dtype=np.float32))
        ids, feature_P = self._sequence(rows, columns)
        return ProcessedImage(
            ids,
            feature_P,
            len(crops) * self.pooled**2,
            np.ascontiguousarray(crops.transpose(0, 3, 1, 2)),
            {"mask": np.stack(masks)},
        )

    def num_tokens(self, width: int, height: int, num_images: int = 1) -> int:
        return len(self._sequence(*self.tiling(height, width))[0])

    def dummy(self) -> ProcessedImage:
        return self(Image.new("RGB", (self.crop * self.patch,) * 2))

    def tiling(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of crops: those that enlarge least, else those that shrink least."""
        sides = range(1, self.max_crops + 1)
        candidates = [(i, j) for i in sides for j in sides if i * j <= self.max_crops]
        candidates.sort(key=lambda ij: (ij[0] * ij[1], ij[0]))
        margins = 2 * self.margin * self.patch
        wanted = np.array([height - margins, width - margins], dtype=np.float32)
        offered = np.array(candidates, dtype=np.int32) * self.window * self.patch
        with np.errstate(divide="ignore"):  # a side of exactly the margins
            scales = np.min(offered.astype(np.float32) / wanted, axis=-1)
        if np.all(scales < 1):
            return candidates[int(np.argmax(scales))]
        return candidates[int(np.argmin(np.where(scales < 1, np.inf, scales)))]

    @staticmethod
    def _fitted(image_HWC: torch.Tensor, high: int, wide: int) -> tuple[np.ndarray, np.ndarray]:
        """The normalised image in the middle of high x wide pixels, and where it is: bool."""
        height, width = image_HWC.shape[:2]
        scale = np.float32(min(np.float32(high) / np.float32(height), np.float32(wide) / width))
        inner = [int(np.float32(side) * scale) for side in (height, width)]
        inner = [max(side, 1) for side in inner]
        resized = torch.nn.functional.interpolate(
            image_HWC.permute(2, 0, 1)[None],
            size=inner,
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )[0].permute(1, 2, 0)
        top, left = (high - inner[0]) // 2, (wide - inner[1]) // 2
        here = (slice(top, top + inner[0]), slice(left, left + inner[1]))
        canvas = np.zeros((high, wide, 3), dtype=np.float32)  # black, and normalised like the rest
        canvas[here] = resized.clamp(0, 1).numpy()
        inside = np.zeros((high, wide), dtype=bool)
        inside[here] = True
        mean, std = np.array(CLIP_MEAN, np.float32), np.array(CLIP_STD, np.float32)
        return (canvas - mean) / std, inside

    def _cut(self, canvas: np.ndarray, row: int, column: int) -> np.ndarray:
        size, step = self.crop * self.patch, self.window * self.patch
        return canvas[row * step : row * step + size, column * step : column * step + size]

    def _per_patch(self, inside: np.ndarray) -> np.ndarray:
        """The share of each patch that is image, float32 [24 * 24]."""
        split = inside.reshape(self.crop, self.patch, self.crop, self.patch)
        return split.astype(np.float32).mean((1, 3)).ravel()

    def _sequence(self, rows: int, columns: int) -> tuple[list[int], np.ndarray]:
        """Token ids, and the feature of each: the global view, then the whole grid of the crops."""
        per_crop = self.pooled**2
        of_crop = np.arange(per_crop).reshape(self.pooled, self.pooled)
        grid = np.concatenate(
            [
                np.concatenate(
                    [
                        (per_crop * (1 + row * columns + column) + of_crop)[
                            self._own(row, rows), self._own(column, columns)
                        ]
                        for column in range(columns)
                    ],
                    axis=1,
                )
                for row in range(rows)
            ]
        )
        ids: list[int] = []
        features: list[int] = []
        for part in (of_crop, grid):
            ids.append(self.start_id)
            features.append(-1)
            for line in part.tolist():
                ids += [*[self.patch_id] * len(line), self.column_id]
                features += [*line, -1]
            ids.append(self.end_id)
            features.append(-1)
        return ids, np.array(features)

    def _own(self, index: int, count: int) -> slice:
        """Features of a crop that no neighbour gives, along one axis; outer margins are its own."""
        edge = self.margin // 2
        first = 0 if index == 0 else edge
        return slice(first, self.pooled if index == count - 1 else self.pooled - edge)
