"""Where tokens stand: attention masks, rotary positions, and the keys and values of tokens before.

Shapes: B sequences, S tokens of this forward, P tokens of forwards before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer

# Attention of transformers whose masks tell documents of a row apart by their positions.
PACKS = ("sdpa", "eager")


class DecodeState:
    """What a model remembers of a text that it reads or writes piece by piece."""

    def __init__(self) -> None:
        self.cache: Cache = DynamicCache()
        self.is_valid_BP: Tensor | None = None
        self.next_position_B: Tensor | None = None

    def mask(self, is_valid_BS: Tensor) -> Tensor:
        """Remember these tokens too; which of all they attend to, as transformers takes it."""
        return attended(self.extend(is_valid_BS)).long()

    def reach(self, next_position_B: Tensor) -> None:
        """Where what follows will stand."""
        self.next_position_B = next_position_B

    def extend(self, is_valid_BS: Tensor) -> Tensor:
        """Remember these tokens too; bool [B, P + S] of all."""
        known = [is_valid_BS] if self.is_valid_BP is None else [self.is_valid_BP, is_valid_BS]
        self.is_valid_BP = torch.cat(known, dim=1)
        return self.is_valid_BP

    def select(self, row_R: Tensor) -> None:
        """What follows are R sequences, each behind one of those so far; one may have several."""
        assert self.is_valid_BP is not None and self.next_position_B is not None
        self.cache.batch_select_indices(row_R)
        self.is_valid_BP = self.is_valid_BP[row_R]
        self.next_position_B = self.next_position_B[row_R]


class FixedDecodeState(DecodeState):
    """The same, with room for some tokens more: what is read and written stays where it is, and as
    large as it is, from token to token. One token of every sequence may come at a time."""

    cache: Cache
    is_valid_BP: Tensor
    next_position_B: Tensor

    def __init__(self, past: DecodeState, room: int) -> None:
        """Raises TypeError for a cache that is not transformers' plain one."""
        assert past.is_valid_BP is not None and past.next_position_B is not None
        known_BP = past.is_valid_BP
        num_sequences, num_known = known_BP.shape
        self.is_valid_BP = known_BP.new_zeros(num_sequences, num_known + room)
        self.is_valid_BP[:, :num_known] = known_BP
        self.next_position_B = past.next_position_B.clone()
        self._place_1 = self.next_position_B.new_full((1,), num_known)
        self.cache = Cache(layers=[_fixed(layer, num_known + room) for layer in past.cache.layers])

    def mask(self, is_valid_BS: Tensor) -> Tensor:
        """Bool [B, 1, 1, P] with the tokens to come left out: transformers takes it as it is."""
        return attended(self.extend(is_valid_BS))[:, None, None]

    def reach(self, next_position_B: Tensor) -> None:
        self.next_position_B.copy_(next_position_B)

    def extend(self, is_valid_BS: Tensor) -> Tensor:
        self.is_valid_BP.index_copy_(1, self._place_1, is_valid_BS)
        self._place_1.add_(1)
        return self.is_valid_BP

    def positions(self) -> list[Tensor]:
        """What says where the next token goes, which a step that is not to count has changed."""
        layers: Any = self.cache.layers
        return [self._place_1, self.next_position_B, *(one.cumulative_length for one in layers)]

    def select(self, row_R: Tensor) -> None:
        raise NotImplementedError("sequences of a fixed state stay as they are")


def _fixed(layer: Any, length: int) -> StaticLayer:
    if type(layer) is not DynamicLayer:
        raise TypeError(type(layer).__name__)
    keys, values = layer.keys, layer.values
    assert keys is not None and values is not None, "a past that was read has both"
    fixed = StaticLayer(max_cache_len=length)
    fixed.update(keys, values)
    return fixed


def attention_inputs(
    is_valid_BS: Tensor,
    past: DecodeState | None,
    position_BS: Tensor | None = None,
    *,
    document_BS: Tensor | None = None,
) -> dict[str, Any]:
    """What a text model of transformers needs to know beside the embeddings.

    Padding may stand on either side. Without any to the left of a token nothing need be masked:
    attention is causal, no valid token sees what follows it, and attention takes its fast path.
    `position_BS` ([B, S] or with leading dimensions) are rotary positions other than 0, 1, ... of
    the valid tokens; they count from where the past ended.

    `document_BS`: see `ModelInputs`. Positions begin at 0 in each document, and where they do not
    go on by one, transformers' masks of `PACKS` begin a sequence: no token sees another document.
    Pictures are not in such a row, so that rotary positions are those of text.
    """
    if document_BS is not None:
        assert past is None, "rows of several documents are read at once"
        return {"use_cache": False, "position_ids": positions_within(document_BS)}
    if past is None and not _has_padding_left(is_valid_BS):
        return {"use_cache": False} | ({} if position_BS is None else {"position_ids": position_BS})
    if position_BS is None:
        position_BS = (is_valid_BS.cumsum(1) - 1).clamp(min=0)
    if past is not None:
        if past.next_position_B is not None:
            position_BS = position_BS + past.next_position_B[:, None]
        furthest_BS = position_BS.flatten(0, -3).amax(0) if position_BS.dim() > 2 else position_BS
        reached_B = furthest_BS.masked_fill(~is_valid_BS, -1).amax(1) + 1
        if past.next_position_B is not None:  # a sequence that has ended stays where it is
            reached_B = torch.maximum(reached_B, past.next_position_B)
        past.reach(reached_B)
    mask = attended(is_valid_BS).long() if past is None else past.mask(is_valid_BS)
    return {
        "attention_mask": mask,
        "position_ids": position_BS,
        "past_key_values": None if past is None else past.cache,
        "use_cache": past is not None,
    }


def positions_within(document_BS: Tensor) -> Tensor:
    """0, 1, ... in each document of a row, int64 [B, S]."""
    place_S = torch.arange(document_BS.shape[1], device=document_BS.device)
    is_first_BS = torch.ones_like(document_BS, dtype=torch.bool)
    is_first_BS[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    return place_S - torch.where(is_first_BS, place_S, 0).cummax(1).values


def attention_of(hf: nn.Module) -> set[str]:
    """The kinds of attention that a model's parts have."""
    parts = (part for part in hf.modules() if isinstance(part, PreTrainedModel))
    return {part.config._attn_implementation or "eager" for part in parts}


def attended(is_valid_BS: Tensor) -> Tensor:
    """The same, but a row of nothing but padding sees itself: softmax over nothing is no number."""
    return is_valid_BS | ~is_valid_BS.any(1, keepdim=True)


def _has_padding_left(is_valid_BS: Tensor) -> bool:
    """Whether a token that counts comes after padding."""
    return bool((is_valid_BS[:, 1:] & ~is_valid_BS[:, :-1]).any())
