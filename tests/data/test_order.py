"""Samples of like length side by side: each as often as without it, and hardly any padding."""

from __future__ import annotations

import time

import numpy as np
import pytest

from gemoe_ds.data.order import CHUNK, LengthGroupedOrder


def mixed_lengths(number: int) -> np.ndarray:
    """As in an instruction mixture: short answers, long ones, text without an image."""
    rng = np.random.default_rng(0)
    image = np.where(rng.random(number) < 0.94, rng.choice([144, 576, 1152], number), 0)
    return (image + rng.lognormal(4.6, 0.9, number)).astype(np.int32).clip(8, 2048)


def plain_order(length_N: np.ndarray, seed: int, size: int, positions: int) -> list[int]:
    """The definition, on one long list."""

    def random(number: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([seed, number, purpose])

    passes = -(-positions // len(length_N)) + 1
    rows = [row for n in range(passes) for row in random(n, 0).permutation(len(length_N))]
    chunk_size = size * max(1, min(CHUNK, len(length_N) // size))
    order: list[int] = []
    for number in range(-(-positions // chunk_size)):
        chunk = sorted(rows[number * chunk_size :][:chunk_size], key=lambda row: int(length_N[row]))
        batches = [chunk[i : i + size] for i in range(0, chunk_size, size)]
        order += [r for i in random(number, 1).permutation(len(batches)) for r in batches[i]]
    return order[:positions]


@pytest.mark.parametrize(("number", "size"), [(23, 4), (7, 16), (640, 12), (40, 1)])
def test_it_is_what_its_definition_says(number, size):
    length_N = np.random.default_rng(number).integers(1, 9, number).astype(np.int32)
    order = LengthGroupedOrder(length_N, seed=3, global_batch_size=size)
    positions = 3 * number + 5
    assert [order[p] for p in range(positions)] == plain_order(length_N, 3, size, positions)


def test_every_sample_comes_equally_often_and_in_another_order_each_pass():
    length_N = mixed_lengths(1000)
    order = LengthGroupedOrder(length_N, seed=0, global_batch_size=16)
    rows = [order[p] for p in range(5 * order.chunk_size)]
    count_N = np.bincount(rows, minlength=1000)
    assert count_N.min() >= count_N.max() - 1
    other = LengthGroupedOrder(length_N, seed=1, global_batch_size=16)
    assert rows[:800] != [other[p] for p in range(800)] != rows[800:1600]


@pytest.mark.parametrize("micro_batch_size", [4, 16])
def test_little_padding_and_ranks_equally_busy(micro_batch_size):
    """8 ranks, global batches of 256; by the tokens that a rank computes, with padding."""
    length_N, ranks, size = mixed_lengths(60_000), 8, 256
    order = LengthGroupedOrder(length_N, seed=0, global_batch_size=size)
    assert order.chunk_size == CHUNK * size
    steps = len(length_N) // size
    length_RB = length_N[[order[p] for p in range(steps * size)]].reshape(-1, micro_batch_size)
    computed_SAW = (length_RB.max(1) * micro_batch_size).reshape(steps, -1, ranks)
    assert length_RB.sum() / computed_SAW.sum() > 0.97
    assert computed_SAW.max(2).sum() / computed_SAW.mean(2).sum() < 1.05
    shuffled = np.random.default_rng(0).permutation(length_N)[: steps * size]
    length_RB = shuffled.reshape(-1, micro_batch_size)
    assert length_RB.sum() / (length_RB.max(1).sum() * micro_batch_size) < 0.85, "without it"


def test_far_into_a_run_it_costs_what_it_costs_at_the_start():
    length_N = mixed_lengths(665_000)
    order = LengthGroupedOrder(length_N, seed=0, global_batch_size=128)
    began = time.process_time()
    assert 0 <= order[10**12 + 7] < 665_000
    assert time.process_time() - began < 2
