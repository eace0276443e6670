"""What kind of token stands where, for statistics of the routing. Shapes: B sequences, S tokens."""

from __future__ import annotations

from collections.abc import Set

import numpy as np

from gemoe_ds.data.collate import IGNORE, Batch

TOKEN_KINDS = ("image", "special", "question", "answer")


def kinds_of(batch: Batch, special_ids: Set[int]) -> np.ndarray:
    """An index into TOKEN_KINDS, int64 [B, S]; text of the chat's template is `question`."""
    is_special = np.isin(batch.input_ids_BS.numpy(), sorted(special_ids))
    is_answer = (batch.turn_BS.numpy() >= 0) | (batch.labels_BS.numpy() != IGNORE)
    kinds_BS: np.ndarray = np.select(
        [batch.is_vision_BS.numpy(), is_special, is_answer], [0, 1, 3], default=2
    )
    return kinds_BS


def answer_positions(batch: Batch) -> np.ndarray:
    """Which token of its answer each is, the first is 0; -1 elsewhere; int64 [B, S]."""
    turn_BS = batch.turn_BS.numpy()
    before_BS = np.pad(turn_BS, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    place_S = np.arange(turn_BS.shape[1])
    first_BS = np.maximum.accumulate(np.where(turn_BS != before_BS, place_S, 0), axis=1)
    positions_BS: np.ndarray = np.where(turn_BS >= 0, place_S - first_BS, -1)
    return positions_BS
