"""What a model reads in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from gemoe_ds.models.kv_cache import DecodeState


@dataclass(frozen=True)
class ModelInputs:
    """B sequences of S tokens, padded.

    `images` holds `pixels` and the extras of the batch's images, concatenated, and `feature_BS`:
    which row of all their features a position takes, -1: none. It is empty for text-only models,
    and where the images are in the `past`: the tokens before these, remembered and extended.
    """

    input_ids_BS: Tensor  # int64
    is_valid_BS: Tensor  # bool: no padding
    is_vision_BS: Tensor  # bool: of an image
    images: dict[str, Tensor] = field(default_factory=dict)
    past: DecodeState | None = None
