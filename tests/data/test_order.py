"""Samples of like length side by side: each as often as without it, and hardly any padding."""

from __future__ import annotations

import time

import numpy as np
import pytest

from gemoe_ds.data.order import CHUNK, Draws, LengthGroupedOrder, MixedPasses, draws_of


def mixed_lengths(number: int) -> np.ndarray:
    """As in an instruction mixture: short answers, long ones, text without an image."""
    rng = np.random.default_rng(0)
    image = np.where(rng.random(number) < 0.94, rng.choice([144, 576, 1152], number), 0)
    return (image + rng.lognormal(4.6, 0.9, number)).astype(np.int32).clip(8, 2048)


def text_lengths(number: int) -> np.ndarray:
    """Of one to five turns, log-normal in length."""
    rng = np.random.default_rng(0)
    turns_N = rng.choice([1, 1, 2, 3, 5], number)
    length_TN = rng.lognormal(3.8, 0.9, (5, number)) * (np.arange(5)[:, None] < turns_N)
    return length_TN.sum(0).astype(np.int32).clip(8, 2048)


def random(seed: int, number: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, number, purpose])


def plain_passes(number: int, seed: int, purpose: int, positions: int) -> list[int]:
    """One shuffled pass after the other."""
    passes = -(-positions // number)
    return [i for n in range(passes) for i in random(seed, n, purpose).permutation(number).tolist()]


def plain_mixture(draws: Draws, seed: int, epochs: int) -> list[int]:
    """The definition, on one long list for each part."""
    lists, before = [], 0
    for part, (size, drawn) in enumerate(zip(draws.sizes, draws.drawn, strict=True)):
        passes = plain_passes(size, seed, 3 + part, epochs * drawn)
        lists.append([before + index for index in passes])
        before += size
    order: list[int] = []
    for epoch in range(epochs):
        of_epoch = [
            index
            for part, drawn in zip(lists, draws.drawn, strict=True)
            for index in part[epoch * drawn : (epoch + 1) * drawn]
        ]
        order += random(seed, epoch, 2).permutation(of_epoch).tolist()
    return order


def plain_order(
    rows: list[int], epoch_size: int, length_N: np.ndarray, seed: int, size: int
) -> list[int]:
    """The definition: batches that begin in an epoch, in chunks of like size, each sorted."""
    num_batches = len(rows) // size
    epoch_of = [batch * size // epoch_size for batch in range(num_batches)]
    order: list[int] = []
    for epoch in sorted(set(epoch_of))[:-1]:  # the last one may be cut
        batches = [batch for batch in range(num_batches) if epoch_of[batch] == epoch]
        chunk_size = -(-len(batches) // -(-len(batches) // CHUNK))
        for at in range(0, len(batches), chunk_size):
            chunk = batches[at : at + chunk_size]
            of_chunk = rows[chunk[0] * size : (chunk[-1] + 1) * size]
            of_chunk = sorted(of_chunk, key=lambda row: int(length_N[row]))
            cut = [of_chunk[i : i + size] for i in range(0, len(of_chunk), size)]
            order += [
                r for i in random(seed, chunk[0], 1).permutation(len(cut)) for r in cut[int(i)]
            ]
    return order


@pytest.mark.parametrize(("number", "size"), [(23, 4), (7, 16), (640, 2), (40, 1)])
def test_it_is_what_its_definition_says(number, size):
    length_N = np.random.default_rng(number).integers(1, 9, number).astype(np.int32)
    order = LengthGroupedOrder(length_N, seed=3, global_batch_size=size)
    rows = plain_passes(number, 3, 0, 4 * max(number, size))
    expected = plain_order(rows, number, length_N, 3, size)
    assert len(expected) >= 2 * number
    assert [order[p] for p in range(len(expected))] == expected


MIXED = [
    draws_of([5, 12, 9], [2, 1, 0.5]),
    draws_of([5, 12, 9], [1, 1, 1], [1, 2, 5]),
    draws_of([1, 30], [7.4, 0.1]),
    draws_of([4], [1]),
]


@pytest.mark.parametrize("draws", MIXED)
@pytest.mark.parametrize("size", [None, 4])
def test_a_mixture_is_what_its_definition_says(draws, size):
    rows = plain_mixture(draws, 3, 6)
    mixed = MixedPasses(draws, seed=3)
    assert mixed.epoch_size == draws.epoch_size == sum(draws.drawn)
    if size is None:
        assert [mixed[p] for p in range(len(rows))] == rows
        return
    length_N = np.random.default_rng(0).integers(1, 9, sum(draws.sizes)).astype(np.int32)
    order = LengthGroupedOrder(length_N, seed=3, global_batch_size=size, endless=mixed)
    expected = plain_order(rows, draws.epoch_size, length_N, 3, size)
    assert [order[p] for p in range(len(expected))] == expected


def test_an_epoch_draws_what_repeats_and_weights_say():
    assert MIXED[0].drawn == (10, 12, 4), "4.5 is rounded to an even number"
    assert MIXED[1].drawn == (3, 7, 16), "26 in shares of 1/8, 2/8, 5/8: 3.25, 6.5, 16.25"
    assert MIXED[2].drawn == (7, 3)
    assert draws_of([100, 3], [0.001, 1]).drawn == (1, 3), "never nothing"


def test_a_part_that_is_halved_is_seen_in_two_epochs():
    mixed = MixedPasses(draws_of([10, 6], [0.5, 2]), seed=1)
    epochs = mixed.at(np.arange(4 * 17)).reshape(4, 17)
    for epoch in epochs:
        assert np.bincount(epoch, minlength=16)[10:].tolist() == [2] * 6
    for first in (0, 2):
        both = np.bincount(epochs[first : first + 2].reshape(-1), minlength=16)
        assert both[:10].tolist() == [1] * 10
    assert sorted(epochs[0]) != sorted(epochs[2]), "halved anew"


@pytest.mark.parametrize("draws", MIXED)
@pytest.mark.parametrize("size", [1, 4, 7])
def test_steps_of_whole_epochs_see_their_samples(draws, size):
    """Grouped or not: all of them, and the first of the next epoch up to the end of a step."""
    mixed, other = MixedPasses(draws, seed=0), MixedPasses(draws, seed=1)
    length_N = np.random.default_rng(0).integers(1, 99, sum(draws.sizes)).astype(np.int32)
    order = LengthGroupedOrder(length_N, seed=0, global_batch_size=size, endless=mixed)
    for epochs in (1, 2, 3):
        seen = range(-(-epochs * draws.epoch_size // size) * size)
        rows = sorted(order[p] for p in seen)
        assert rows == sorted(mixed[p] for p in seen)
        count_N = np.bincount(rows, minlength=sum(draws.sizes))
        assert (
            count_N
            >= np.bincount(
                [mixed[p] for p in range(epochs * draws.epoch_size)], minlength=sum(draws.sizes)
            )
        ).all()
    if draws.epoch_size > 4:
        assert [mixed[p] for p in range(20)] != [other[p] for p in range(20)]


def test_every_sample_comes_equally_often_and_in_another_order_each_pass():
    length_N = mixed_lengths(1000)
    order = LengthGroupedOrder(length_N, seed=0, global_batch_size=16)
    for epochs in (1, 2, 5):
        rows = [order[p] for p in range(-(-epochs * 1000 // 16) * 16)]
        count_N = np.bincount(rows, minlength=1000)
        assert count_N.min() == epochs and (count_N > epochs).sum() == len(rows) - epochs * 1000
    other = LengthGroupedOrder(length_N, seed=1, global_batch_size=16)
    assert rows[:800] != [other[p] for p in range(800)] != rows[800:1600]


@pytest.mark.parametrize(
    ("lengths", "micro_batch_size"),
    [(mixed_lengths, 4), (mixed_lengths, 16), (text_lengths, 4), (text_lengths, 8)],
)
def test_little_padding_and_ranks_equally_busy(lengths, micro_batch_size):
    """8 ranks, global batches of 128 as in the recipes, by the tokens that a rank computes, with
    padding: of a mixture, and of texts alone."""
    length_N, ranks, size = lengths(60_000), 8, 128
    order = LengthGroupedOrder(length_N, seed=0, global_batch_size=size)
    steps = len(length_N) // size
    assert order.chunk_of(0) == (0, 157), "469 steps, in three chunks"
    length_RB = length_N[[order[p] for p in range(steps * size)]].reshape(-1, micro_batch_size)
    computed_SAW = (length_RB.max(1) * micro_batch_size).reshape(steps, -1, ranks)
    assert length_RB.sum() / computed_SAW.sum() > 0.97
    assert computed_SAW.max(2).sum() / computed_SAW.mean(2).sum() < 1.05
    shuffled = np.random.default_rng(0).permutation(length_N)[: steps * size]
    length_RB = shuffled.reshape(-1, micro_batch_size)
    assert length_RB.sum() / (length_RB.max(1).sum() * micro_batch_size) < 0.85, "without it"


def test_far_into_a_run_it_costs_what_it_costs_at_the_start():
    length_N = mixed_lengths(665_000)
    mixed = MixedPasses(draws_of([500_000, 165_000], [0.5, 2]), seed=0)
    for endless in (None, mixed):
        order = LengthGroupedOrder(length_N, seed=0, global_batch_size=128, endless=endless)
        began = time.process_time()
        assert 0 <= order[10**12 + 7] < 665_000
        assert time.process_time() - began < 2
