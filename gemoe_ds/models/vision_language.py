"""What a vision-language model that is put together of transformers' parts says about itself.

Shapes: B sequences, S tokens, F features of all images, D model.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from gemoe_ds.models.images import put_features


class VisionLanguageModel(nn.Module):
    """A language model of transformers, and image features that go to places of its sequence."""

    config: Any  # what `from_json` of its class makes of config.json

    @property
    @abstractmethod
    def text(self) -> Any:
        """The language model without its head: inputs_embeds [B, S, D] -> last_hidden_state."""

    @property
    @abstractmethod
    def head(self) -> nn.Module:
        """From hidden states to vocabulary logits."""

    @abstractmethod
    def image_features(self, images: dict[str, Tensor]) -> Tensor:
        """Rows [F, D] of all images, in order: `images` has their `pixels` and extras, joined."""

    @staticmethod
    def put(embedded_BSD: Tensor, features_FD: Tensor, feature_BS: Tensor) -> Tensor:
        """The embeddings with row feature_BS of the features where that is not -1."""
        return put_features(embedded_BSD, features_FD, feature_BS)

    def gradient_checkpointing_enable(self, options: dict[str, Any]) -> None:
        self.text.gradient_checkpointing_enable(options)
