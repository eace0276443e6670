"""How long a run's samples are and which of them cannot be used, before anything is loaded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.config import RunConfig
from gemoe_ds.data.all_lengths import lengths_of
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
from gemoe_ds.data.lengths import Lengths
from gemoe_ds.data.mixture import SampleList
from gemoe_ds.data.order import LengthGroupedOrder, Selection, endless_of
from gemoe_ds.data.row_names import Sources, sources_of
from gemoe_ds.engine.world import World, broadcast_from_first, gather_objects
from gemoe_ds.progress import PROGRESS
from gemoe_ds.train.checks.selection import (
    cut_of,
    described,
    order_of_rows,
    samples_per_step,
    selection_of,
)

_MUCH_PADDING = 0.15


class Checked(NamedTuple):
    """What is known of a run's samples."""

    lengths: Lengths | None  # of all, on the first rank
    bad_samples: BadSampleLog
    selection: Selection
    sources: Sources | None  # that the metrics tell apart


def check_samples(
    config: RunConfig,
    samples: SampleList,
    collator: Collator,
    world: World | None = None,
    stop: StopRequest | None = None,
    *,
    may_write: bool = False,
    num_ranks: int = 1,
) -> Checked | None:
    """The lengths, of which the first rank tells, what is trained on, and what is left out of that.

    DataError if more than `data.max_bad_samples` are too long or have an image without a header,
    and what `selection_of` refuses. None if a rank was asked to stop. Lengths are kept beside the
    data, or else (`may_write`) in the folder of the run. Collective, but without a `world`, where
    `num_ranks` says what is told of a step.
    """
    PROGRESS.enter("measuring samples")
    began = time.perf_counter()
    gather = gather_objects if world else alone
    num_ranks = world.size if world else num_ranks
    lengths, files = lengths_of(
        samples,
        collator,
        rank=world.rank if world else 0,
        world=world.size if world else 1,
        gather=gather,
        output=Path(config.output_dir),
        may_write=may_write,
        stops=lambda: bool(stop and stop.by),
    )

    def select() -> tuple[Selection, Sources | None] | None:
        if lengths is None:
            return None
        kept = f"kept in {', '.join(map(str, files))}" if files else "kept nowhere"
        seconds = time.perf_counter() - began
        print(f"lengths of {len(lengths):,} samples: {seconds:.1f} s; {kept}", flush=True)
        selection = selection_of(lengths, samples, config)
        for line in report(lengths, config, selection, num_ranks):
            print(line, flush=True)
        for line in described(config, lengths, selection, samples, num_ranks):
            print(line, flush=True)
        return selection, sources_of(samples)

    found = broadcast_from_first(select, world) if world else select()
    if found is None:
        return None
    selection, sources = found
    taken = len(samples) if selection.row_M is None else len(selection.row_M)
    log = BadSampleLog(config.data.max_bad_samples, taken, gather)
    output = Path(config.output_dir) if may_write else None
    leave_out_known(lengths, samples, collator, log, output, row_M=selection.row_M)
    return Checked(lengths, log, selection, sources)


def leave_out_known(
    lengths: Lengths | None,
    samples: SampleList,
    collator: Collator,
    log: BadSampleLog,
    output: Path | None = None,
    *,
    row_M: np.ndarray | None = None,
) -> None:
    """List in `log`, and tell, what cannot be used; DataError if it is too much. Collective.

    The first rank has the lengths. A list that is too long is left in `output`. `row_M`: the rows
    that matter; None: all.
    """
    bad: list[BadSample] = []
    number = 0
    if lengths is not None:
        rows = np.flatnonzero(lengths.cut(collator.max_length).is_bad_N)
        rows = rows if row_M is None else np.intersect1d(rows, row_M)
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


def report(
    lengths: Lengths, config: RunConfig, selection: Selection, num_ranks: int = 1
) -> Iterator[str]:
    """Lengths, images, cuts and padding of what may be trained on, a line each."""
    data, batch = config.data, config.train.micro_batch_size
    cut = cut_of(lengths, config)
    is_dropped_N = cut.is_dropped_N.copy()
    if selection.held_out_H is not None:
        is_dropped_N[selection.held_out_H] = False
    rows = np.arange(len(lengths)) if selection.row_M is None else selection.row_M
    taken = lengths.of_rows(rows)
    cut = taken.cut(data.max_length)
    whole_M = taken.whole_N
    line = f"  {whole_M.mean():,.0f} tokens on average, {whole_M.max():,} at most"
    if images := int((taken.image_N > 0).sum()):
        share = taken.image_N.sum() / max(whole_M.sum(), 1)
        line += f"; {images:,} have an image, {share:.0%} of all tokens"
    yield line
    is_cut_M = (cut.cut_answers_N > 0) & ~cut.is_bad_N
    if is_cut_M.any():
        yield (
            f"  cut: {cut.cut_answers_N[is_cut_M].sum():,} answers of {is_cut_M.sum():,} samples "
            f"do not fit into data.max_length={data.max_length}; {whole_M[~cut.is_bad_N].max():,} "
            "would hold them all"
        )
    if cut.is_bad_N.any():
        is_long_M = cut.is_bad_N.copy()
        is_long_M[[*taken.broken]] = False
        longest = f" (the longest has {whole_M[is_long_M].max():,})" if is_long_M.any() else ""
        yield (
            f"  left out: samples without a target in data.max_length={data.max_length}: "
            f"{is_long_M.sum():,}{longest}; that cannot be read: {len(taken.broken):,}; "
            f"data.max_bad_samples={data.max_bad_samples:g}"
        )
    if is_dropped_N.any():
        yield (
            f"  dropped: {is_dropped_N.sum():,} samples of more than data.max_length="
            f"{data.max_length} tokens (data.too_long=drop)"
        )
    length_E = _of_an_epoch(cut.length_N, config, selection, num_ranks)
    if number := len(length_E) // batch:
        length_RB = length_E[: number * batch].reshape(number, batch)
        padding = 1 - length_RB.sum() / (length_RB.max(1).sum() * batch)
        line = f"  padding: {padding:.0%} of the tokens of micro-batches of {batch}"
        if padding > _MUCH_PADDING and not (data.group_by_length or data.pack):
            line += "; data.group_by_length=true leaves little of it"
        yield line


def mean_length(config: RunConfig, checked: Checked, num_ranks: int) -> float:
    """Tokens of a row of a micro-batch: of a sample, or of the samples that are packed into it."""
    assert checked.lengths is not None, "this is the first rank"
    length_N, row_M = cut_of(checked.lengths, config).length_N, checked.selection.row_M
    length_M = length_N if row_M is None else length_N[row_M]
    return float(_of_an_epoch(length_M, config, checked.selection, num_ranks).mean())


def _of_an_epoch(
    length_M: np.ndarray, config: RunConfig, selection: Selection, num_ranks: int
) -> np.ndarray:
    """The lengths of an epoch's samples, or packed rows, in its order; but of samples that are
    only shuffled in another random order, which is as good and takes no time."""
    if selection.row_tokens:
        return order_of_rows(config, selection, num_ranks).lengths
    endless = endless_of(selection, len(length_M), config.seed)
    if not config.data.group_by_length:
        return length_M[endless.at(np.arange(endless.epoch_size))]
    size = samples_per_step(config, num_ranks)
    order = LengthGroupedOrder(length_M, seed=config.seed, global_batch_size=size, endless=endless)
    return length_M[order.epoch(0)]
