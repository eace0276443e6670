"""DeepSeek-VL2's images: a small view of everything, then tiles of 384 x 384 as one mosaic.

Shapes: N tiles, the global one first; P positions in the sequence. A tile becomes 14 x 14 features;
every row of features ends with a learned newline, and a learned separator stands between view
and mosaic. All of them go to positions of the one `<image>` token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from gemoe_ds.models.images import ProcessedImage

MEAN = STD = (0.5, 0.5, 0.5)
_SIDES = (  # width and height in tiles, in the published order, on which ties depend
    *((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 2), (1, 5), (5, 1), (1, 6)),
    *((6, 1), (2, 3), (3, 2), (1, 7), (7, 1), (1, 8), (8, 1), (2, 4), (4, 2), (1, 9), (9, 1)),
    (3, 3),
)


def resolutions(tile: int) -> list[tuple[int, int]]:
    """Widths and heights in pixels that a picture may be fitted into."""
    return [(tile * wide, tile * high) for wide, high in _SIDES]


@dataclass(frozen=True)
class DeepseekVl2Images:
    """Rows of `<image>` tokens for the view, the separator and the mosaic."""

    token_id: int = 128815
    tile: int = 384  # pixels
    side: int = 14  # features

    @property
    def settings(self) -> dict[str, Any]:
        """What processor_config.json would say of what is built in here."""
        return {
            "image_mean": list(MEAN),
            "image_std": list(STD),
            "patch_size": 14,
            "downsample_ratio": 2,
            "candidate_resolutions": [list(size) for size in resolutions(self.tile)],
            "image_token": "<image>",
        }

    @property
    def token(self) -> tuple[str, int]:
        return "<image>", self.token_id

    def __call__(self, rgb: Image.Image, num_images: int = 1) -> ProcessedImage:
        rows, columns = self._grid(*rgb.size, num_images)
        mosaic = self._padded(rgb, (columns * self.tile, rows * self.tile))
        tiles = [self._padded(rgb, (self.tile, self.tile))]
        for y in range(rows):
            for x in range(columns):
                left, top = x * self.tile, y * self.tile
                tiles.append(mosaic.crop((left, top, left + self.tile, top + self.tile)))
        pixels = np.stack([np.asarray(tile, dtype=np.float32) for tile in tiles])
        feature_P = self._sequence(rows, columns)
        return ProcessedImage(
            [self.token_id] * len(feature_P),
            feature_P,
            len(tiles) * self.side**2 + 2,
            np.ascontiguousarray((pixels / 255 - MEAN[0]) / STD[0]).transpose(0, 3, 1, 2),
            {"tiles": np.array([len(tiles)])},
        )

    def num_tokens(self, width: int, height: int, num_images: int = 1) -> int:
        return len(self._sequence(*self._grid(width, height, num_images)))

    def _grid(self, width: int, height: int, num_images: int) -> tuple[int, int]:
        """Rows and columns of tiles; a picture among more than two is not cut up."""
        if num_images > 2:
            return 1, 1
        wide, high = self.best_resolution(width, height)
        return high // self.tile, wide // self.tile

    def dummy(self) -> ProcessedImage:
        return self(Image.new("RGB", (self.tile, self.tile)))

    def best_resolution(self, width: int, height: int) -> tuple[int, int]:
        """The one that keeps most of the picture's pixels; among equals the least of waste."""
        best, best_kept, least_waste = (self.tile, self.tile), 0, float("inf")
        for wide, high in resolutions(self.tile):
            scale = min(wide / width, high / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            waste = wide * high - kept
            if kept > best_kept or (kept == best_kept and waste < least_waste):
                best, best_kept, least_waste = (wide, high), kept, waste
        return best

    @staticmethod
    def _padded(rgb: Image.Image, size: tuple[int, int]) -> Image.Image:
        return ImageOps.pad(rgb, size, color=(127, 127, 127))

    def _sequence(self, rows: int, columns: int) -> np.ndarray:
        """The feature of each position. Newline and separator are the last two rows."""
        per_tile = self.side**2
        newline = (1 + rows * columns) * per_tile
        of_tile = np.arange(per_tile).reshape(self.side, self.side)
        grid = 1 + np.arange(rows * columns).reshape(rows, columns)
        mosaic = grid[:, None, :, None] * per_tile + of_tile[None, :, None, :]
        mosaic = mosaic.reshape(rows * self.side, columns * self.side)
        lines = [np.append(line, newline) for line in (*of_tile, *mosaic)]
        return np.concatenate([*lines[: self.side], [newline + 1], *lines[self.side :]])
