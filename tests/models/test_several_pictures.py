"""Samples with several pictures train like any other: a batch of them is its samples one by one."""

from __future__ import annotations

import random

import pytest

from gemoe_ds.data.collate import Collator
from tests.data.ragged import ragged
from tests.models.cases import CASES
from tests.models.test_packing import alike, build, gradients

LM = {"auxiliary_weight": 0.0}  # others are means over a batch


def encoded_of(name: str, collator: Collator) -> list:
    """One without pictures, one with two in later questions, one with three."""
    found, rng = {}, random.Random(3)
    while len(found) < 3:
        sample, _ = ragged(rng, str(len(found)), pictures=3, system=False, texts=False)
        encoded = collator.encode(0, sample)
        if len(encoded.images) in (0, 2, 3):
            found.setdefault(len(encoded.images), encoded)
    return list(found.values())


@pytest.mark.parametrize("name", ["tiny", *(n for n in CASES if n not in ("olmoe", "molmoe"))])
def test_a_batch_is_its_samples_one_by_one(folders, name):  # noqa: F811
    model, collator = build(folders, name)
    collator.max_length = 10**5
    encoded = encoded_of(name, collator)
    batch = collator.batch(encoded)
    assert sum(len(e.images) for e in encoded) == 5 and batch.is_vision_BS.any()
    loss, total = gradients(model, collator.batch(encoded[:1]), **LM)
    for one in encoded[1:]:
        alone = gradients(model, collator.batch([one]), **LM)
        loss = loss + alone[0]
        for n, gradient in alone[1].items():
            total[n] = total[n] + gradient
    alike(gradients(model, batch, **LM), (loss, total))
