"""Which tokens are padding, by masks of every kind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gemoe_ds.moe.padding import valid_tokens

PAST, TOKENS, STATIC = 2, 3, 4  # before, in this forward, and room that a static cache has left
VALID = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]) != 0  # of all tokens up to now


def wide(width):
    """bool [2, 1, TOKENS, width]: a token sees the valid ones up to itself."""
    places, seen = torch.arange(width), torch.zeros(2, width, dtype=torch.bool)
    seen[:, : VALID.shape[1]] = VALID
    return (places <= PAST + torch.arange(TOKENS)[:, None]) & seen[:, None, None]


def added(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


NARROW, WIDE = wide(PAST + TOKENS), wide(PAST + TOKENS + STATIC)
SLIDING = NARROW & NARROW.new_tensor([0, 0, 0, 1, 1])


@pytest.mark.parametrize(
    "mask",
    [VALID.long(), NARROW, WIDE, added(WIDE)]
    + [{"sliding_attention": SLIDING, "full_attention": WIDE}, {"chunked_attention": WIDE}],
)
def test_masks_of_every_kind_say_the_same(mask):
    past = SimpleNamespace(get_seq_length=lambda: torch.tensor(PAST))
    given = {"attention_mask": mask, "past_key_values": past}
    found = valid_tokens(given, torch.Size([2, TOKENS]), "")
    assert torch.equal(found, VALID[:, PAST:])


@pytest.mark.parametrize("given", [{}, {"attention_mask": {"full_attention": None}}])
def test_without_a_mask_nothing_is_padding(given):
    assert valid_tokens(given, torch.Size([2, TOKENS]), "") is None


@pytest.mark.parametrize(
    "mask, said", [(NARROW[:, :, :1], r"of shape \[2, 1, 1, 5\]"), ({}, "dict")]
)
def test_a_mask_that_does_not_say_it_is_refused(mask, said):
    with pytest.raises(RuntimeError, match=f"{said} does not say.*padding: do this"):
        valid_tokens({"attention_mask": mask}, torch.Size([2, TOKENS]), "do this")
