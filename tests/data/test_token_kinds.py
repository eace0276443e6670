"""Kinds of tokens and places in answers, against a walk from token to token."""

from __future__ import annotations

import torch

from gemoe_ds.data.collate import IGNORE, Batch
from gemoe_ds.data.token_kinds import TOKEN_KINDS, answer_positions, kinds_of


def random_batch(seed: int) -> Batch:
    """Answers of any length, one after the other too; images, special tokens and cut answers."""
    g = torch.Generator().manual_seed(seed)
    turn_BS = torch.full((4, 30), -1, dtype=torch.int16)
    for turns_S in turn_BS:
        place = 0
        for turn in range(5):
            place += int(torch.randint(0, 4, (1,), generator=g))
            length = int(torch.randint(0, 5, (1,), generator=g))
            turns_S[place : place + length] = turn
            place += length
    is_label_BS = (turn_BS >= 0) | (torch.rand(4, 30, generator=g) < 0.2)
    ids_BS = torch.randint(0, 12, (4, 30), generator=g)
    vision_BS = (torch.rand(4, 30, generator=g) < 0.2) & ~is_label_BS
    labels_BS = ids_BS.masked_fill(~is_label_BS, IGNORE)
    valid_BS = torch.ones_like(vision_BS)
    return Batch(ids_BS, labels_BS, valid_BS, vision_BS, turn_BS, {}, ("",) * 4, (0, 1, 2, 3))


def test_every_token_has_the_kind_and_place_that_a_walk_finds() -> None:
    for seed in range(30):
        batch = random_batch(seed)
        kinds_BS, places_BS = kinds_of(batch, {2, 7}), answer_positions(batch)
        for b in range(4):
            place, last = -1, -1
            for s in range(30):
                turn, token = int(batch.turn_BS[b, s]), int(batch.input_ids_BS[b, s])
                kind = "question"
                if batch.is_vision_BS[b, s]:
                    kind = "image"
                elif token in (2, 7):
                    kind = "special"
                elif turn >= 0 or batch.labels_BS[b, s] != IGNORE:
                    kind = "answer"
                assert TOKEN_KINDS[kinds_BS[b, s]] == kind
                place = -1 if turn < 0 else place + 1 if turn == last else 0
                assert places_BS[b, s] == place
                last = turn
