"""From folders to steps, a part of `python -m benchmarks.data`.

    encoding   samples a second of one core for every backbone's collator: pictures decoded, laid
               and cut, texts tokenised, micro-batches padded
    valid      the share of the tokens of micro-batches that are no padding, and how busy the
               busiest of 8 ranks is: by length, and shuffled; of 60,000 samples, whose lengths are
               drawn from those of the generated ones
    loaders    seconds that the same samples take, in the same order and with the same collator,
               from our loader and from PyTorch's DataLoader over `datasets` on the same files
    reading    samples a second of 8 reader threads and of 1, of a disk that takes 10 ms a read

Backbones have their published settings and a tokenizer of whole words. Contenders take turns.
Seconds are those that the process computed, but for `reading`, whose threads wait.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.data_sets import jpeg
from benchmarks.timing import Timing, measure, paired
from gemoe_ds.data.collate import Batch, Collator
from gemoe_ds.data.lengths import measured as measured_lengths
from gemoe_ds.data.order import Selection
from gemoe_ds.data.sample import SampleFolder, Turn, of_turns, open_samples, write_samples
from gemoe_ds.data.schema import sample_of
from gemoe_ds.data.shards import ArrowShard
from gemoe_ds.data.stream import TrainStream, order_of
from gemoe_ds.errors import SampleError
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.random_checkpoint import write_stand_in_tokenizer
from gemoe_ds.models.tokenizer import load_tokenizer

BACKBONES = ("olmoe", "molmoe", "deepseek_vl2", "qwen3_vl_moe", "moe_llava_qwen")
QWEN: dict[str, Any] = {  # its preprocessor_config.json, with the recipe's max_pixels
    "size": {"shortest_edge": 65536, "longest_edge": 1048576},
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
SIZES = ((640, 480), (480, 640), (500, 375), (336, 336), (1024, 683))  # of pictures
TEXT_ONLY = 0.06  # of the samples, as in mix665k
BATCH, MAX_LENGTH = 8, 2048
# As the recipes of 8 GPUs have it: of a step, and of a micro-batch, 8 where nothing is said.
GLOBAL, MICRO = 128, {"molmoe": 16, "deepseek_vl2": 16}
ENCODED = 48  # samples of a timed round at most
DRAWN, RANKS = 60_000, 8  # lengths that are drawn; ranks
SECONDS_A_READ, THREADS, READ = 0.01, 8, 240
_WORDS = [f"word{number}" for number in range(2000)]


def measured(*, rows: int, rounds: int, place: Path) -> dict[str, Any]:
    """All of it, on generated samples in `place`."""
    backbones = [name for name in BACKBONES if name in Backbone.names()]
    texts = _written(place / "texts", rows, pictures=False)
    mixed = _written(place / "mixed", rows, pictures=True)
    found: dict[str, Any] = {"rows": rows, "loaded_at_once": BATCH, "global_batch": GLOBAL}
    found["backbones"] = []
    for name in backbones:
        collator = _collator(name, place / f"tokenizer_{name}")
        samples = mixed if collator.layout else texts
        row = {"backbone": name} | _encoding(samples, collator, rounds)
        row |= _valid(samples, collator, MICRO.get(name, BATCH))
        row |= _loaders(samples, collator, rounds, place / f"cache_{name}")
        found["backbones"].append(row)
        if name == backbones[0]:
            short = _written(place / "short", READ, pictures=False, most_turns=1, words=0.5)
            found["reading"] = _reading(short.path, collator, rounds)
    return found


def _written(
    folder: Path, rows: int, *, pictures: bool, most_turns: int = 5, words: float = 3.5
) -> SampleFolder:
    """Conversations of one to five turns, log-normal in length; a picture in most, or in none."""
    draw, rng = random.Random(0), np.random.default_rng(0)
    # 50 to 150 KB each; what is written behind the end of one is not read
    shown = [jpeg(rng, *SIZES[number % len(SIZES)]) for number in range(min(rows, 50))]

    def said(mean: float) -> str:
        return " ".join(draw.choices(_WORDS, k=max(1, round(draw.lognormvariate(mean, 0.9)))))

    def samples() -> Iterator[Any]:
        for index in range(rows):
            number = min(draw.choice((1, 1, 2, 3, 5)), most_turns)
            turns = [Turn(said(words - 1), said(words)) for _ in range(number)]
            has_picture = pictures and draw.random() >= TEXT_ONLY
            picture = shown[index % len(shown)] + str(index).encode() if has_picture else None
            yield of_turns(f"{index:09d}", picture, turns)

    write_samples(samples(), folder, source="benchmarks/data_feed.py")
    return open_samples(folder)


def _collator(name: str, folder: Path) -> Collator:
    """As a run makes it, from the backbone's published settings."""
    chosen = Backbone.named(name)
    backbone: Any = chosen(chosen.Config())
    if name == "qwen3_vl_moe":  # what it would read of a folder
        backbone.processor = Qwen2VLImageProcessorPil(**QWEN)
    layout = backbone.image_layout(chosen.published())
    write_stand_in_tokenizer(chosen, _WORDS, folder, layout)
    tokenizer = load_tokenizer(folder, backbone.chat, layout.token if layout else None)
    return Collator(tokenizer, layout, backbone.chat, max_length=MAX_LENGTH)


def _encoding(samples: SampleFolder, collator: Collator, rounds: int) -> dict[str, Any]:
    number = min(ENCODED, len(samples)) // BATCH * BATCH

    def encode() -> None:
        for first in range(0, number, BATCH):
            rows = range(first, first + BATCH)
            collator.batch([collator.encode_or_leave_out(row, samples[row]) for row in rows])

    timing = measure({"encoding": encode}, rounds, clock=time.process_time)["encoding"]
    return {"samples_a_second_and_core": round(number / timing.median, 1)}


def _valid(samples: SampleFolder, collator: Collator, size: int) -> dict[str, Any]:
    """Of an epoch's micro-batches, from lengths alone."""
    lengths = measured_lengths(samples, collator, range(len(samples)))
    assert lengths is not None
    measured_N = lengths.cut(MAX_LENGTH).length_N.astype(np.int32)
    length_N = np.random.default_rng(0).choice(measured_N, DRAWN)
    found: dict[str, Any] = {"mean_tokens": round(float(length_N.mean()), 1), "micro_batch": size}
    for title, selection in (
        ("grouped", Selection(length_M=length_N)),
        ("shuffled", Selection()),
    ):
        seen = _in_order(selection, DRAWN, DRAWN // GLOBAL * GLOBAL)
        length_SARB = length_N[seen].reshape(-1, GLOBAL // size // RANKS, RANKS, size)
        computed_SAR = length_SARB.max(3) * size
        found[f"valid_{title}"] = round(float(length_SARB.sum() / computed_SAR.sum()), 4)
        busiest = computed_SAR.max(2).sum() / computed_SAR.mean(2).sum()
        found[f"busiest_rank_{title}"] = round(float(busiest), 4)
    return found


def _in_order(selection: Selection, number: int, positions: int) -> list[int]:
    """The first samples of a run over so many."""
    order = order_of(selection, number, seed=0, global_batch_size=GLOBAL)
    return [order[place] for place in range(positions)]


def _loaders(samples: SampleFolder, collator: Collator, rounds: int, cache: Path) -> dict[str, Any]:
    """The median of the paired ratios; above 1: the plain loader takes longer."""
    number = min(ENCODED, len(samples)) // BATCH
    rows = _in_order(Selection(), len(samples), number * BATCH)
    plain = _plain_loader(samples, collator, cache, rows)

    def ours() -> None:
        stream = TrainStream(
            samples,
            collator,
            seed=0,
            micro_batch_size=BATCH,
            accumulation=1,
            rank=0,
            world=1,
            num_workers=1,
        )
        for _ in islice(stream, number):
            pass
        stream.close()

    def theirs() -> None:
        for _ in plain():
            pass

    timings = measure({"ours": ours, "plain": theirs}, rounds, clock=time.process_time)
    one, other = timings["ours"], timings["plain"]
    return {
        "loader_samples_a_second": round(number * BATCH / one.median, 1),
        "plain_loader_samples_a_second": round(number * BATCH / other.median, 1),
        "plain_over_ours_seconds": round(paired(lambda a, b: b / a, one, other), 3),
    }


def _plain_loader(
    samples: SampleFolder, collator: Collator, cache: Path, rows: list[int]
) -> Callable[[], Iterator[Batch]]:
    """What one would write without this project: map-style rows, a sampler, a collate function."""
    import datasets

    datasets.disable_progress_bars()
    files = [str(samples.path / shard["file"]) for shard in samples.manifest["shards"]]
    table = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(cache))
    raw = table.with_format("arrow")

    def encoded(some: list[int]) -> Batch:
        parts = []
        for row in some:
            batch = raw[row].to_batches()[0]
            try:
                parts.append(collator.encode(row, sample_of(batch, 0, _stored)))
            except SampleError as error:
                raise AssertionError("generated samples can be used") from error
        return collator.batch(parts)

    def loader() -> Iterator[Batch]:
        return iter(
            torch.utils.data.DataLoader(
                range(len(raw)),  # type: ignore[arg-type]
                batch_size=BATCH,
                sampler=rows,
                collate_fn=encoded,
                num_workers=0,
            )
        )

    return loader


def _stored(row: int, place: int) -> bytes:
    raise AssertionError("each picture is stored where it is shown")


def _reading(path: Path, collator: Collator, rounds: int) -> dict[str, Any]:
    """Wall time, as the threads wait for the disk; nothing is kept in memory."""
    read = ArrowShard._read

    def slow(shard: ArrowShard, reader: Any, number: int) -> Any:
        time.sleep(SECONDS_A_READ)
        return read(shard, reader, number)

    def run(workers: int) -> None:
        stream = TrainStream(
            open_samples(path, cache_bytes=0),
            collator,
            seed=0,
            micro_batch_size=1,
            accumulation=1,
            rank=0,
            world=1,
            num_workers=workers,
            expected_bytes=1,
        )
        for _ in range(READ):
            next(stream)
        stream.close()

    with mock.patch.object(ArrowShard, "_read", slow):
        timings: dict[str, Timing] = measure(
            {"one": lambda: run(1), "many": lambda: run(THREADS)}, rounds
        )
    one, many = timings["one"], timings["many"]
    return {
        "seconds_a_read": SECONDS_A_READ,
        "threads": THREADS,
        "samples_a_second_of_one": round(READ / one.median, 1),
        "samples_a_second": round(READ / many.median, 1),
        "times_one": round(paired(lambda a, b: a / b, one, many), 2),
    }
