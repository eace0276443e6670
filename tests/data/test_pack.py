"""Rows that several samples fill: which share one, what a batch of them holds, in what order."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest

from gemoe_ds.data.collate import IGNORE, Collator
from gemoe_ds.data.order import Draws, MixedPasses, Passes, Selection
from gemoe_ds.data.pack import CHUNK, PackedOrder, fill, joined
from gemoe_ds.data.sample import open_samples, write_samples
from gemoe_ds.data.stream import TrainStream
from gemoe_ds.models.chat import ChatTemplate
from gemoe_ds.models.images import SquareImages
from gemoe_ds.models.tokenizer import load_tokenizer
from tests.data.ragged import ragged
from tests.tiny import write_tokenizer

ROOM = 40


def filled_slowly(lengths, room) -> list[list[int]]:
    """Best-fit decreasing, row by row; among equals the row that got there last."""
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # room, and when: later is better
    for when, number in enumerate(sorted(range(len(lengths)), key=lambda n: -lengths[n])):
        fits = [row for row in range(len(rows)) if left[row][0] >= lengths[number]]
        if fits:
            row = min(fits, key=lambda row: (left[row][0], -left[row][1]))
        else:
            row = len(rows)
            rows.append([])
            left.append((room, when))
        rows[row].append(number)
        left[row] = (left[row][0] - lengths[number], when)
    return rows


@pytest.mark.parametrize("seed", range(8))
def test_rows_are_filled_best_fit_decreasing(seed):
    rng = random.Random(seed)
    room = rng.choice([7, 40, 300])
    lengths = [min(room, 1 + int(rng.expovariate(4 / room))) for _ in range(rng.randint(1, 200))]
    rows = fill(lengths, room)
    assert rows == filled_slowly(lengths, room)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert max(sum(lengths[n] for n in row) for row in rows) <= room
    assert len(rows) <= max(1.25 * sum(lengths) / room + 1, sum(2 * n > room for n in lengths))


def order_of(endless, number=500, seed=3, size=2) -> PackedOrder:
    length_M = np.random.default_rng(0).integers(1, ROOM + 1, number).astype(np.int32) // 2 + 1
    return PackedOrder(length_M, endless, max_length=ROOM, seed=seed, global_batch_size=size)


@pytest.mark.parametrize("mixed", [False, True])
def test_an_epoch_of_rows_has_the_samples_of_an_epoch(mixed):
    draws = Draws((200, 300), (400, 150))
    endless = MixedPasses(draws, seed=3) if mixed else Passes(500, seed=3)
    order, size = order_of(endless), endless.epoch_size
    position, before = 0, None
    for epoch in range(3):
        rows = [order[position + row] for row in range(len(order.plan(epoch)))]
        expected = endless.at(np.arange(epoch * size, (epoch + 1) * size))
        assert sorted(np.concatenate(rows)) == sorted(expected)
        tokens = [int(order.length_M[row].sum()) for row in rows]
        assert max(tokens) <= ROOM and sum(tokens) > 0.97 * ROOM * len(rows)
        if epoch == 0:
            assert order.lengths.tolist() == tokens
        assert (rows != before) if before is None else [*map(list, rows)] != [*map(list, before)]
        position, before = position + len(rows), rows
    assert order.rows_of(3) == position and order.rows_of(1.5) == len(order.plan(0)) + round(
        len(order.plan(1)) / 2
    )


def test_a_row_is_the_same_whenever_it_is_asked_for():
    whole = order_of(Passes(500, seed=3))
    rows = [whole[position].tolist() for position in range(700)]
    again = order_of(Passes(500, seed=3))
    for position in (699, 0, 350, 12):
        assert again[position].tolist() == rows[position]
    other = order_of(Passes(500, seed=3), seed=4)
    assert [other[position].tolist() for position in range(100)] != rows[:100]


def test_chunks_are_of_about_so_many_global_batches():
    """Samples that stand far apart in the epoch share no row."""
    endless = Passes(5000, seed=3)
    order = order_of(endless, 5000)
    place_M = np.argsort(endless.at(np.arange(5000)))
    spread = max(int(np.ptp(place_M[order[row]])) for row in range(len(order.plan(0))))
    mean = order.length_M.mean()
    assert spread < 1.2 * CHUNK * 2 * ROOM / mean and spread < 500


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Talks and texts; of row 5 nothing fits, of others some is cut."""
    root, rng = tmp_path_factory.mktemp("pack"), random.Random(2)
    rows = [ragged(rng, f"s{i}", pictures=0, system=False)[0] for i in range(60)]
    write_samples(rows, root / "data", source="test")
    collator = Collator(
        load_tokenizer(write_tokenizer(root / "tokenizer")),
        SquareImages(8, 4, 3),
        ChatTemplate(),
        max_length=ROOM,
    )
    samples = open_samples(root / "data")
    lengths = [len(collator.encode_or_leave_out(i, samples[i]).input_ids) for i in range(60)]
    selection = Selection(length_M=np.array(lengths, np.int32), row_tokens=ROOM)
    return SimpleNamespace(samples=samples, collator=collator, selection=selection)


def stream_of(setting, *, world=1, rank=0, accumulation=1, start=0, samples=None, batch=2):
    return TrainStream(
        samples or setting.samples,
        setting.collator,
        seed=7,
        micro_batch_size=batch,
        accumulation=accumulation,
        rank=rank,
        world=world,
        num_workers=2,
        start_step=start,
        selection=setting.selection,
    )


def seen(stream, steps):
    found = [[batch.ids for batch in step] for step in itertools.islice(stream, steps)]
    stream.close()
    return found


def test_splits_and_resumed_streams_see_the_same_rows(setting):
    whole = seen(stream_of(setting, accumulation=4), 12)
    for world, accumulation in ((2, 2), (4, 1)):
        ranks = [
            seen(stream_of(setting, world=world, rank=rank, accumulation=accumulation), 12)
            for rank in range(world)
        ]
        for step in range(12):
            merged = [ranks[r][step][a] for a in range(accumulation) for r in range(world)]
            assert merged == whole[step]
    assert seen(stream_of(setting, accumulation=4, start=5), 7) == whole[5:]


def test_a_batch_is_its_samples_behind_each_other(setting):
    for (batch,), _ in zip(stream_of(setting), range(30), strict=False):
        assert batch.input_ids_BS.shape[0] == 2 and batch.input_ids_BS.shape[1] <= ROOM
        assert batch.cut_answers == sum(
            setting.collator.encode(row, setting.samples[row]).cut_answers for row in batch.rows
        )
        tokens = batch.per_sample(batch.is_valid_BS)
        for number, row in enumerate(batch.rows):
            alone = setting.collator.encode(row, setting.samples[row])
            here_BS = batch.document_BS == number
            there_BS = here_BS & batch.is_valid_BS
            assert batch.input_ids_BS[there_BS].tolist() == alone.input_ids
            assert batch.labels_BS[there_BS].tolist() == alone.labels and alone.labels[0] == IGNORE
            assert batch.turn_BS[there_BS].tolist() == alone.turn
            assert (batch.labels_BS[here_BS & ~there_BS] == IGNORE).all()
            assert tokens[number] == len(alone.input_ids)
        last_B = batch.document_BS[:, -1]
        assert (batch.document_BS.diff(dim=1) >= 0).all() and last_B[1] == len(batch.rows) - 1


def test_a_bad_sample_is_a_token_of_padding_in_its_row(setting):
    bad = setting.collator.encode_or_leave_out(0, setting.samples[0].__class__("bad", ()))
    good = [setting.collator.encode(row, setting.samples[row]) for row in (1, 2)]
    batch = setting.collator.batch([joined([good[0], bad, good[1]])])
    assert [one.id for one in batch.bad] == ["bad"] and batch.ids == ("s1", "bad", "s2")
    invalid = (~batch.is_valid_BS[0]).nonzero().flatten().tolist()
    assert invalid == [len(good[0].input_ids)]
    assert batch.per_sample(batch.is_valid_BS).tolist() == [
        len(good[0].input_ids),
        0,
        len(good[1].input_ids),
    ]


def test_batches_of_single_samples_know_no_documents(setting):
    encoded = [setting.collator.encode(row, setting.samples[row]) for row in range(3)]
    batch = setting.collator.batch(encoded)
    assert batch.document_BS is None and "document_BS" not in batch.inputs
    assert batch.per_sample(batch.is_valid_BS).tolist() == [len(e.input_ids) for e in encoded]
    packed = setting.collator.batch([joined(encoded)])
    assert packed.to("cpu").document_BS.tolist() == packed.document_BS.tolist()
    assert not packed.silenced().is_valid_BS.any()
