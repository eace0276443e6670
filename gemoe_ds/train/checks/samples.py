"""How long a run's samples are and which of them cannot be used, before anything is loaded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.config import RunConfig
from gemoe_ds.data.bad_samples import (
    REFUSED,
    SHOWN,
    BadSample,
    BadSampleLog,
    alone,
    listed,
    write_list,
)
from gemoe_ds.data.collate import Collator
from gemoe_ds.data.lengths import Cut, Lengths, file_name, keep, known_lengths
from gemoe_ds.data.order import LengthGroupedOrder, Selection
from gemoe_ds.data.sample import SampleFolder
from gemoe_ds.data.stream import check_number
from gemoe_ds.engine.world import World, gather_objects
from gemoe_ds.errors import DataError, writing_to
from gemoe_ds.progress import PROGRESS

_MUCH_PADDING = 0.15


def check_samples(
    config: RunConfig,
    samples: SampleFolder,
    collator: Collator,
    world: World | None = None,
    stop: StopRequest | None = None,
    *,
    may_write: bool = False,
) -> tuple[Lengths | None, BadSampleLog]:
    """The lengths, on the first rank, which tells of them, and what is left out, on all ranks.

    DataError if more than `data.max_bad_samples` are too long or have an image without a header.
    No lengths if a rank was asked to stop. They are kept beside the data, or else (`may_write`) in
    the folder of the run. Collective, but without a `world`.
    """
    PROGRESS.enter("measuring samples")
    began = time.perf_counter()
    lengths, file = known_lengths(
        samples,
        collator,
        rank=world.rank if world else 0,
        world=world.size if world else 1,
        gather=gather_objects if world else alone,
        others=[Path(config.output_dir)],
        stops=lambda: bool(stop and stop.by),
    )
    if lengths is not None:
        if file is None and may_write:
            with writing_to(config.output_dir):
                Path(config.output_dir).mkdir(parents=True, exist_ok=True)
            file = keep(lengths, Path(config.output_dir) / file_name(samples, collator))
        kept = f"kept in {file}" if file else f"{samples.path} cannot be written to"
        seconds = time.perf_counter() - began
        print(f"lengths of {len(lengths):,} samples: {seconds:.1f} s; {kept}", flush=True)
        for line in report(lengths, config, world.size if world else 1):
            print(line, flush=True)
    log = BadSampleLog(
        config.data.max_bad_samples, len(samples), gather_objects if world else alone
    )
    output = Path(config.output_dir) if may_write else None
    leave_out_known(lengths, samples, collator, log, output, drop=config.data.too_long == "drop")
    return lengths, log


def leave_out_known(
    lengths: Lengths | None,
    samples: SampleFolder,
    collator: Collator,
    log: BadSampleLog,
    output: Path | None = None,
    *,
    drop: bool = False,
) -> None:
    """List in `log`, and tell, what cannot be used; DataError if it is too much. Collective.

    The first rank has the lengths. A list that is too long is left in `output`. `drop`: samples
    that are too long are not among them.
    """
    bad: list[BadSample] = []
    number = 0
    if lengths is not None:
        rows = np.flatnonzero(lengths.cut(collator.max_length, drop=drop).is_bad_N)
        number = len(rows)
        allowed = log.allows(number)
        some = rows if allowed or output else rows[:SHOWN]
        bad = lengths.bad_samples(samples, collator.max_length, some)
        for line in listed(bad, number):
            print(line, flush=True)
        if output and not allowed:
            write_list(output, REFUSED, ((0, sample) for sample in bad))
            bad = bad[:SHOWN]
    log.record(bad)
    log.check(log.gather(number)[0], output and output / REFUSED)


def report(lengths: Lengths, config: RunConfig, num_ranks: int = 1) -> Iterator[str]:
    """Lengths, images, cuts and padding, a line each."""
    data, batch = config.data, config.train.micro_batch_size
    whole_N, cut = lengths.whole_N, cut_of(lengths, config)
    is_used_N = ~(cut.is_bad_N | cut.is_dropped_N)
    line = f"  {whole_N.mean():,.0f} tokens on average, {whole_N.max():,} at most"
    if images := int((lengths.image_N > 0).sum()):
        share = lengths.image_N.sum() / max(whole_N.sum(), 1)
        line += f"; {images:,} have an image, {share:.0%} of all tokens"
    yield line
    is_cut_N = (cut.cut_answers_N > 0) & is_used_N
    if is_cut_N.any():
        yield (
            f"  cut: {cut.cut_answers_N[is_cut_N].sum():,} answers of {is_cut_N.sum():,} samples "
            f"do not fit into data.max_length={data.max_length}; {whole_N[is_used_N].max():,} "
            "would hold them all"
        )
    if cut.is_bad_N.any():
        is_long_N = cut.is_bad_N.copy()
        is_long_N[[*lengths.broken]] = False
        longest = f" (the longest has {whole_N[is_long_N].max():,})" if is_long_N.any() else ""
        yield (
            f"  left out: samples without a target in data.max_length={data.max_length}: "
            f"{is_long_N.sum():,}{longest}; that cannot be read: {len(lengths.broken):,}; "
            f"data.max_bad_samples={data.max_bad_samples:g}"
        )
    if cut.is_dropped_N.any():
        yield (
            f"  dropped: {cut.is_dropped_N.sum():,} samples of more than data.max_length="
            f"{data.max_length} tokens (data.too_long=drop)"
        )
    length_M = cut.length_N[~cut.is_dropped_N]
    if rows := len(length_M) // batch:
        length_RB = _in_order(length_M, config, num_ranks)[: rows * batch].reshape(rows, batch)
        padding = 1 - length_RB.sum() / (length_RB.max(1).sum() * batch)
        line = f"  padding: {padding:.0%} of the tokens of micro-batches of {batch}"
        if padding > _MUCH_PADDING and not data.group_by_length:
            line += "; data.group_by_length=true leaves little of it"
        yield line


def selection_of(lengths: Lengths | None, samples: SampleFolder, config: RunConfig) -> Selection:
    """What is trained on, on the rank that has the lengths; DataError if a sample may not be."""
    assert lengths is not None
    data, whole_N = config.data, lengths.whole_N
    too_long = int((whole_N > data.max_length).sum())
    if data.too_long == "stop" and too_long:
        longest = int(whole_N.argmax())
        raise DataError(
            f"{too_long:,} samples have more than data.max_length={data.max_length} tokens (sample "
            f"{samples[longest].id} has {whole_N[longest]:,}), and data.too_long is stop: set "
            "data.too_long=cut or drop, or raise data.max_length"
        )
    cut = cut_of(lengths, config)
    row_M = np.flatnonzero(~cut.is_dropped_N)
    check_number(samples, len(row_M), config.train.micro_batch_size)
    length_M = cut.length_N[~cut.is_dropped_N].astype(np.int32) if data.group_by_length else None
    return Selection(row_M if cut.is_dropped_N.any() else None, length_M)


def cut_of(lengths: Lengths, config: RunConfig) -> Cut:
    """What is left of every sample under `data.max_length` and `data.too_long`."""
    return lengths.cut(config.data.max_length, drop=config.data.too_long == "drop")


def _in_order(length_M: np.ndarray, config: RunConfig, num_ranks: int) -> np.ndarray:
    """The lengths of samples as a pass over them sees them."""
    if not config.data.group_by_length:
        return np.random.default_rng(config.seed).permutation(length_M)
    size = config.train.micro_batch_size * config.accumulation_steps(num_ranks) * num_ranks
    order = LengthGroupedOrder(length_M, seed=config.seed, global_batch_size=size)
    chunks = range(-(-len(length_M) // order.chunk_size))
    return length_M[np.concatenate([order.chunk(chunk) for chunk in chunks])[: len(length_M)]]
