"""What a model reads in one forward pass, and how it comes to a language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gemoe_ds.models.images import put_features
from gemoe_ds.models.kv_cache import DecodeState, attention_inputs


@dataclass(frozen=True)
class ModelInputs:
    """B sequences of S tokens, padded.

    `images` holds `pixels` and the extras of the batch's images, concatenated, and `feature_BS`:
    which row of all their features a position takes, -1: none. It is empty for text-only models,
    and where the images are in the `past`: the tokens before these, remembered and extended.
    `document_BS` is given where a row has several sequences behind each other: the number of each
    token's, which rises from row to row and within a row. A token attends to its own alone.
    """

    input_ids_BS: Tensor  # int64
    is_valid_BS: Tensor  # bool: no padding
    is_vision_BS: Tensor  # bool: of an image
    images: dict[str, Tensor] = field(default_factory=dict)
    past: DecodeState | None = None
    document_BS: Tensor | None = None  # int64


def run_text(
    text: Any,
    inputs: ModelInputs,
    image_features: Callable[[dict[str, Tensor]], Tensor],
    put: Callable[[Tensor, Tensor, Tensor], Tensor] = put_features,
) -> Tensor:
    """The last hidden states [B, S, D] of a model of transformers, with images where they belong.

    The merge is ours, not the model's: a rank without images runs the same modules as the others,
    on a dummy one, because ZeRO gathers and reduces module by module on all ranks.
    `image_features` makes features [F, D] of the batch's images, whose pixels have the dtype of the
    embeddings.
    """
    embedded_BSD = text.get_input_embeddings()(inputs.input_ids_BS)
    if inputs.images:
        images = inputs.images | {"pixels": inputs.images["pixels"].to(embedded_BSD.dtype)}
        embedded_BSD = put(embedded_BSD, image_features(images), images["feature_BS"])
    hidden_BSD: Tensor = text(
        inputs_embeds=embedded_BSD,
        **attention_inputs(inputs.is_valid_BS, inputs.past, document_BS=inputs.document_BS),
    ).last_hidden_state
    return hidden_BSD
