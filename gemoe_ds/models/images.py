"""An image as a model reads it: the tokens that stand for it, its pixels, and which goes where.

Shapes: P positions in the sequence, N tiles (or patches) of pixels, F rows of features; a batch has
B sequences of S tokens in D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Extras that the host reads, to cut tensors: they stay there when a batch goes to a device.
ON_HOST = ("grid_thw", "tiles")


@dataclass(frozen=True)
class ProcessedImage:
    """One image of a sample."""

    input_ids: list[int]  # P: everything that stands for it (patches, columns, start, end ...)
    feature_P: np.ndarray  # int64: the row of its features that belongs there; -1: none
    num_features: int  # rows that the model makes of it, those that go nowhere included
    pixels: np.ndarray  # float32, normalised: [N, 3, H, W], or whatever the tower takes, [N, ...]
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)  # joined along the first axis


class ImageLayout(Protocol):
    """A backbone's image processor."""

    def __call__(self, rgb: Image.Image, num_images: int = 1) -> ProcessedImage:
        """`num_images`: in the whole conversation; some models cut only few of them into tiles."""

    def num_tokens(self, width: int, height: int, num_images: int = 1) -> int:
        """Of a picture of so many pixels: as many as `input_ids` has. The size says it all."""

    def dummy(self) -> ProcessedImage:
        """The smallest image there is, for ranks that have none."""

    @property
    def token(self) -> tuple[str, int] | None:
        """The token that a feature goes to, and the id that the model knows it by; None: none."""


@dataclass(frozen=True)
class SquareImages:
    """An image is stretched to size x size, in [-1, 1], and stands for `tokens` tokens."""

    size: int
    tokens: int
    token_id: int

    @property
    def token(self) -> tuple[str, int]:
        return "<image>", self.token_id

    def __call__(self, rgb: Image.Image, num_images: int = 1) -> ProcessedImage:
        pixels_NCHW = stretched(rgb, self.size)[None].astype(np.float32) / 127.5 - 1
        return ProcessedImage(
            [self.token_id] * self.tokens, np.arange(self.tokens), self.tokens, pixels_NCHW
        )

    def num_tokens(self, width: int, height: int, num_images: int = 1) -> int:
        return self.tokens

    def dummy(self) -> ProcessedImage:
        return self(Image.new("RGB", (self.size, self.size)))


def stretched(rgb: Image.Image, size: int) -> np.ndarray:
    """uint8 [3, size, size]"""
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(rgb).transpose(2, 0, 1)


def put_features(embedded_BSD: Tensor, features_FD: Tensor, feature_BS: Tensor) -> Tensor:
    """The embeddings with row feature_BS of the features in their place where that is not -1.

    Where no feature is wanted at all the result still hangs on the features: gradients, zeros,
    reach every module of the tower on every rank.
    """
    here_BS = feature_BS >= 0
    return put_rows(embedded_BSD, features_FD[feature_BS[here_BS]], here_BS)


def put_rows(embedded_BSD: Tensor, rows_PD: Tensor, here_BS: Tensor) -> Tensor:
    """The same with the rows that go to these places, one after the other."""
    return embedded_BSD.masked_scatter(here_BS[..., None], rows_PD.to(embedded_BSD.dtype))


def add_features(embedded_BSD: Tensor, features_FD: Tensor, feature_BS: Tensor) -> Tensor:
    """The embeddings plus row feature_BS of the features where that is not -1; as above."""
    added_BSD = put_features(torch.zeros_like(embedded_BSD), features_FD, feature_BS)
    return embedded_BSD + added_BSD
