"""The order of samples: independent of how the batch is split, endless, resumable in O(1)."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from gemoe_ds.data.collate import Collator
from gemoe_ds.data.order import Selection
from gemoe_ds.data.sample import Turn, of_turns, open_samples, write_samples
from gemoe_ds.data.shards import ArrowShard
from gemoe_ds.data.stream import EvalStream, TrainStream
from gemoe_ds.errors import DataError
from gemoe_ds.models.chat import ChatTemplate
from gemoe_ds.models.images import SquareImages
from gemoe_ds.models.tokenizer import load_tokenizer
from tests.data.turns import turns_of, with_turns
from tests.tiny import write_tokenizer

NUM = 23


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    root = tmp_path_factory.mktemp("stream")
    samples = (
        of_turns(f"s{i}", None, (Turn("a b", "c d e"[: 1 + 2 * (i % 3)]),)) for i in range(NUM)
    )
    write_samples(samples, root / "data", source="test", shard_size=5)
    tokenizer = load_tokenizer(write_tokenizer(root / "tokenizer"))
    collator = Collator(tokenizer, SquareImages(8, 4, 3), ChatTemplate(), max_length=64)
    return open_samples(root / "data"), collator


LENGTHS = np.array([7 + i % 3 for i in range(NUM)], np.int32)
GROUPED = pytest.mark.parametrize("length_N", [None, LENGTHS], ids=["shuffled", "by length"])


def sample_log(
    setting,
    steps,
    *,
    world=1,
    rank=0,
    accumulation=1,
    start=0,
    batch=3,
    seed=7,
    row_M=None,
    length_N=None,
):
    samples, collator = setting
    stream = TrainStream(
        samples,
        collator,
        seed=seed,
        micro_batch_size=batch,
        accumulation=accumulation,
        rank=rank,
        world=world,
        num_workers=2,
        start_step=start,
        selection=Selection(row_M, length_N),
    )
    return [[b.ids for b in batches] for batches in itertools.islice(stream, steps)]


@GROUPED
def test_splits_of_one_global_batch_see_the_same_micro_batches(setting, length_N):
    alone = sample_log(setting, 20, accumulation=4, length_N=length_N)
    for world, accumulation in ((2, 2), (4, 1)):
        ranks = [
            sample_log(
                setting, 20, world=world, rank=r, accumulation=accumulation, length_N=length_N
            )
            for r in range(world)
        ]
        for step in range(20):
            merged = [ranks[r][step][a] for a in range(accumulation) for r in range(world)]
            assert merged == alone[step]


def test_every_pass_holds_every_sample_once_in_another_order(setting):
    ids = [i for step in sample_log(setting, NUM * 2, batch=1) for block in step for i in block]
    first, second = ids[:NUM], ids[NUM:]
    assert sorted(first) == sorted(second) == sorted(f"s{i}" for i in range(NUM))
    assert first != second
    assert first != [i for s in sample_log(setting, NUM, batch=1, seed=8) for b in s for i in b]


@GROUPED
@pytest.mark.parametrize("start", [0, 1, 9, 30])
def test_resumed_stream_continues_the_uninterrupted_one(setting, start, length_N):
    options = {"world": 2, "rank": 1, "accumulation": 2, "length_N": length_N}
    whole = sample_log(setting, 34, **options)
    assert sample_log(setting, 4, start=start, **options) == whole[start : start + 4]


def test_samples_of_like_length_share_a_step(setting):
    samples, collator = setting
    assert [len(collator.encode(i, samples[i]).input_ids) for i in range(NUM)] == LENGTHS.tolist()
    steps = sample_log(setting, 40, batch=2, accumulation=2, length_N=LENGTHS)
    lengths = [{LENGTHS[int(i[1:])] for ids in step for i in ids} for step in steps]
    assert np.mean([len(of_step) for of_step in lengths]) < 1.6
    shuffled = sample_log(setting, 40, batch=2, accumulation=2)
    lengths = [{LENGTHS[int(i[1:])] for ids in step for i in ids} for step in shuffled]
    assert np.mean([len(of_step) for of_step in lengths]) > 2


@GROUPED
def test_samples_that_are_not_taken_never_come(setting, length_N):
    taken = np.array([1, 2, 5, 7, 11, 13, 22])
    of_taken = None if length_N is None else length_N[taken]
    steps = sample_log(setting, 14, batch=1, row_M=taken, length_N=of_taken)
    ids = [i for step in steps for ids in step for i in ids]
    assert sorted(ids) == sorted(2 * [f"s{row}" for row in taken])
    with pytest.raises(DataError, match="7 of 23 samples do not fill train.micro_batch_size=8"):
        sample_log(setting, 1, batch=8, row_M=taken)


@GROUPED
def test_resume_takes_no_longer_far_into_the_run(setting, length_N):
    began = time.perf_counter()
    sample_log(setting, 1, start=10_000_000, length_N=length_N)
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_sample_once_and_all_ranks_iterate_equally(setting, world):
    samples, collator = setting
    seen, lengths = [], set()
    for rank in range(world):
        batches = list(EvalStream(samples, collator, batch=4, rank=rank, world=world))
        lengths.add(len(batches))
        seen += [i for b in batches if b is not None for i in b.ids]
    assert sorted(seen) == sorted(f"s{i}" for i in range(NUM))
    assert len(lengths) == 1


def test_too_few_samples_for_a_micro_batch(setting):
    with pytest.raises(DataError, match="23 samples do not fill train.micro_batch_size=24"):
        sample_log(setting, 1, batch=24)


def test_two_ranks_see_what_one_with_twice_the_accumulation_sees(setting):
    """The whole batches, not only their ids."""
    samples, collator = setting
    options = {"seed": 3, "micro_batch_size": 4, "num_workers": 2, "start_step": 5}
    alone = next(TrainStream(samples, collator, rank=0, world=1, accumulation=2, **options))
    for rank in range(2):
        (batch,) = next(
            TrainStream(samples, collator, rank=rank, world=2, accumulation=1, **options)
        )
        for name in ("input_ids_BS", "labels_BS", "is_valid_BS", "turn_BS", "images"):
            torch.testing.assert_close(getattr(batch, name), getattr(alone[rank], name))
        assert batch.rows == alone[rank].rows


def test_rows_find_their_samples(setting):
    samples, collator = setting
    stream = TrainStream(
        samples,
        collator,
        seed=0,
        micro_batch_size=5,
        accumulation=1,
        rank=0,
        world=1,
        num_workers=1,
    )
    evaluation = EvalStream(samples, collator, batch=5, rank=0, world=1)
    for batch in [*next(stream), *(b for b in evaluation if b is not None)]:
        assert [samples[row].id for row in batch.rows] == list(batch.ids)


def test_bad_samples_are_left_out_and_the_others_keep_their_places(setting, tmp_path):
    """Damage that came after the conversion, and a question without room for its answer."""
    good, collator = setting
    spoiled = {
        3: of_turns("s3", b"no image", turns_of(good[3])),
        11: with_turns(good[11], Turn("a " * 80, "b")),
    }
    harmed = (spoiled.get(row, good[row]) for row in range(len(good)))
    write_samples(harmed, tmp_path / "data", source="test")
    samples, met = open_samples(tmp_path / "data"), {}
    common = dict(seed=0, micro_batch_size=2, accumulation=1, rank=0, world=1, num_workers=2)
    whole = TrainStream(good, collator, **common)
    stream = TrainStream(samples, collator, **common)
    for _ in range(len(good)):  # two passes
        ((batch,), (other,)) = next(whole), next(stream)
        assert other.rows == batch.rows
        met |= {bad.row: bad for bad in other.bad}
        assert {bad.row for bad in other.bad} == spoiled.keys() & set(other.rows)
        for index, row in enumerate(other.rows):
            if row in spoiled:
                assert not other.is_valid_BS[index].any()
                assert (other.labels_BS[index] == -100).all()
            else:
                count = int(batch.is_valid_BS[index].sum())
                same = batch.input_ids_BS[index, :count] == other.input_ids_BS[index, :count]
                assert same.all() and int(other.is_valid_BS[index].sum()) == count
    assert met[3].reason.startswith("sample s3: its image cannot be decoded")
    assert met[3].needs is None and met[11].needs == 1 + 1 + 80 + 1 + 1 + 1
    assert met[11].reason == (
        "sample s11: no answer fits into data.max_length=64: 83 tokens stand before the first one, "
        "and the sample has 85"
    )


def test_grain_does_not_talk_about_jax():
    """Its import warns on stderr; nothing here would use what is missing."""
    said = subprocess.run(
        [sys.executable, "-c", "from gemoe_ds.data.stream import _import_grain as i; i()"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stderr == "" and logging.root.manager.disable == logging.NOTSET


def test_threads_read_ahead_side_by_side(setting, monkeypatch):
    """From a disk that takes 10 ms a read; `make data-bench` measures how much faster that is."""
    _, collator = setting
    read, lock, busy, most = ArrowShard._read, threading.Lock(), 0, 0

    def slow(shard, reader, number):
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.01)
        with lock:
            busy -= 1
        return read(shard, reader, number)

    monkeypatch.setattr(ArrowShard, "_read", slow)
    seconds = []
    for workers in (1, 8):
        samples = open_samples(setting[0].path, cache_bytes=0)
        options = dict(seed=0, micro_batch_size=2, accumulation=1, rank=0, world=1)
        stream = TrainStream(samples, collator, num_workers=workers, **options, expected_bytes=1)
        began, most = time.perf_counter(), 0
        for _ in range(40):
            next(stream)
        seconds.append(time.perf_counter() - began)
        stream.close()
        assert most >= 0.7 * workers
    assert seconds[0] / seconds[1] > 3, "6 on a machine with nothing else to do"


@pytest.mark.parametrize("prefetch_bytes", [1, 2**20])
def test_micro_batches_ahead_are_bounded_by_bytes(setting, prefetch_bytes):
    samples, collator = setting
    made, waiting, most = 0, 0, 0

    class Watched(Collator):
        def batch(self, encoded, *, left=False):
            nonlocal made, most
            made += 1
            most = max(most, made - waiting)
            return super().batch(encoded, left=left)

    watched = Watched(collator.tokenizer, collator.layout, ChatTemplate(), max_length=64)
    stream = TrainStream(
        samples,
        watched,
        seed=0,
        micro_batch_size=2,
        accumulation=3,
        rank=0,
        world=1,
        num_workers=4,
        prefetch_bytes=prefetch_bytes,
    )
    for _ in range(5):
        assert len(next(stream)) == 3
        time.sleep(0.01)
        waiting += 3
    stream.close()
    if prefetch_bytes == 1:
        assert most <= 3 + 1, "those of a step, and the next one"
    else:
        assert most > 3 + 1
