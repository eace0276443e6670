"""Which samples a run trains on, and how many of each part an epoch has.

Left out in this order: what is held out, what is too long, what is over the limit of its part.
Shapes: N samples, M that are taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from gemoe_ds.config import RunConfig
from gemoe_ds.data.holdout import held_out_rows
from gemoe_ds.data.lengths import Cut, Lengths
from gemoe_ds.data.mixture import Mixture, MixturePart, SampleList
from gemoe_ds.data.order import Draws, Selection, draws_of
from gemoe_ds.data.pack import PackedOrder, packed_order
from gemoe_ds.data.stream import check_number
from gemoe_ds.errors import DataError

_LIMIT = 4  # what random numbers are for; those of order.py are others


def selection_of(lengths: Lengths, samples: SampleList, config: RunConfig) -> Selection:
    """What is trained on, on the rank that has the lengths; DataError if a sample may not be, or
    if too few are left."""
    data, cut = config.data, cut_of(lengths, config)
    is_taken_N = np.ones(len(samples), bool)
    held_out_H = held_out_rows(samples, data.holdout) if data.holdout else None
    if held_out_H is not None:
        is_taken_N[held_out_H] = False
    if data.too_long == "stop":
        _refuse_too_long(lengths, samples, is_taken_N, data.max_length)
    is_taken_N &= ~cut.is_dropped_N
    draws = None
    if isinstance(samples, Mixture):
        parts = _parts(config)
        _limit(is_taken_N, samples, parts, config.seed)
        draws = _draws(is_taken_N, samples, parts)
    row_M = np.flatnonzero(is_taken_N)
    check_number(samples, len(row_M), config.train.micro_batch_size)
    by_length = data.group_by_length or data.pack
    length_M = cut.length_N[row_M].astype(np.int32) if by_length else None
    taken_M, row_tokens = None if is_taken_N.all() else row_M, None
    if data.pack:
        _refuse_pictures(lengths, samples, row_M)
        row_tokens = data.max_length
    return Selection(taken_M, length_M, draws, held_out_H, row_tokens)


def cut_of(lengths: Lengths, config: RunConfig) -> Cut:
    """What is left of every sample under `data.max_length` and `data.too_long`."""
    return lengths.cut(config.data.max_length, drop=config.data.too_long == "drop")


def epoch_size(selection: Selection, samples: SampleList) -> int:
    """Samples of one pass."""
    if selection.draws:
        return selection.draws.epoch_size
    return len(samples) if selection.row_M is None else len(selection.row_M)


def steps_of(config: RunConfig, selection: Selection, samples: SampleList, num_ranks: int) -> int:
    """What `train.epochs` comes to: the last step is filled up from the next pass."""
    assert config.train.epochs is not None
    number = round(config.train.epochs * epoch_size(selection, samples))
    if selection.row_tokens:
        number = order_of_rows(config, selection, num_ranks).rows_of(config.train.epochs)
    return -(-max(1, number) // samples_per_step(config, num_ranks))


def order_of_rows(config: RunConfig, selection: Selection, num_ranks: int) -> PackedOrder:
    """Of a run whose samples are packed."""
    size = samples_per_step(config, num_ranks)
    return packed_order(selection, seed=config.seed, global_batch_size=size)


def with_epochs_counted(
    config: RunConfig, selection: Selection, samples: SampleList, num_ranks: int
) -> RunConfig:
    """The run with its number of steps; ConfigError if the warm-up has more."""
    if config.train.epochs is None:
        return config
    return config.with_num_steps(steps_of(config, selection, samples, num_ranks))


def samples_per_step(config: RunConfig, num_ranks: int) -> int:
    return config.train.micro_batch_size * config.accumulation_steps(num_ranks) * num_ranks


def described(
    config: RunConfig, lengths: Lengths, selection: Selection, samples: SampleList, num_ranks: int
) -> Iterator[str]:
    """What is held out, what an epoch has of each part, and what epochs come to; a line each."""
    cut = cut_of(lengths, config)
    if selection.held_out_H is not None:
        yield (
            f"  held out: {len(selection.held_out_H):,} of {len(samples):,} samples "
            f"(data.holdout={config.data.holdout:g})"
        )
    if selection.draws and isinstance(samples, Mixture):
        draws = selection.draws
        part_M = samples.part_of(_rows(selection, samples))
        token_M = cut.length_N[_rows(selection, samples)]
        mean_P = [token_M[part_M == part].mean() for part in range(len(draws.sizes))]
        tokens = sum(drawn * mean for drawn, mean in zip(draws.drawn, mean_P, strict=True))
        for name, size, drawn, mean in zip(
            samples.names, draws.sizes, draws.drawn, mean_P, strict=True
        ):
            yield (
                f"  {name}: {size:,} samples of {mean:,.0f} tokens on average; an epoch takes "
                f"{drawn:,}: {drawn / draws.epoch_size:.1%} of the samples, "
                f"{drawn * mean / max(tokens, 1):.1%} of the tokens"
            )
    number, what = epoch_size(selection, samples), "samples"
    epochs = config.train.epochs
    over = round((epochs or 0) * number)
    if selection.row_tokens:
        order = order_of_rows(config, selection, num_ranks)
        length_R = order.lengths
        yield (
            f"  packed: {number:,} samples fill {len(length_R):,} rows of {selection.row_tokens:,} "
            f"tokens, {length_R.sum() / (len(length_R) * selection.row_tokens):.1%} of them valid"
        )
        number, what = len(length_R), "rows"
        over = order.rows_of(epochs or 0)
    if epochs is not None:
        size = samples_per_step(config, num_ranks)
        steps = steps_of(config, selection, samples, num_ranks)
        over = steps * size - over
        yield (
            f"  train.epochs={epochs:g} of {number:,} {what}, {size:,} a step: {steps:,} steps"
            + (f"; the last one has {over:,} of the next epoch" if over else "")
        )


def _rows(selection: Selection, samples: SampleList) -> np.ndarray:
    return np.arange(len(samples)) if selection.row_M is None else selection.row_M


def _parts(config: RunConfig) -> Sequence[MixturePart]:
    assert not isinstance(config.data.train_path, str), "a mixture has parts"
    return config.data.train_path


def _refuse_too_long(
    lengths: Lengths, samples: SampleList, is_taken_N: np.ndarray, max_length: int
) -> None:
    whole_N = np.where(is_taken_N, lengths.whole_N, 0)
    if too_long := int((whole_N > max_length).sum()):
        longest = int(whole_N.argmax())
        raise DataError(
            f"{too_long:,} samples have more than data.max_length={max_length} tokens (sample "
            f"{samples[longest].id} has {whole_N[longest]:,}), and data.too_long is stop: set "
            "data.too_long=cut or drop, or raise data.max_length"
        )


def _refuse_pictures(lengths: Lengths, samples: SampleList, row_M: np.ndarray) -> None:
    seen = row_M[lengths.image_N[row_M] > 0]
    if len(seen):
        raise DataError(
            f"data.pack=true: {len(seen):,} samples have pictures (sample "
            f"{samples.outline(int(seen[0])).id} is one), and rows with pictures are not packed; "
            "set data.pack=false and data.group_by_length=true, or train on data without pictures"
        )


def _limit(
    is_taken_N: np.ndarray, samples: Mixture, parts: Sequence[MixturePart], seed: int
) -> None:
    """Leave out, at random, what is over the limit of its part."""
    first = 0
    for number, (part, size) in enumerate(zip(parts, samples.sizes, strict=True)):
        rows = first + np.flatnonzero(is_taken_N[first : first + size])
        if part.limit is not None and len(rows) > part.limit:
            random = np.random.default_rng([seed, number, _LIMIT, 0, 0])
            is_taken_N[random.permutation(rows)[part.limit :]] = False
        first += size


def _draws(is_taken_N: np.ndarray, samples: Mixture, parts: Sequence[MixturePart]) -> Draws:
    sizes = np.add.reduceat(is_taken_N.astype(np.int64), np.cumsum([0, *samples.sizes[:-1]]))
    weights = [part.weight for part in parts if part.weight is not None]
    repeats = [1.0 if part.repeat is None else part.repeat for part in parts]
    for name, size in zip(samples.names, sizes, strict=True):
        if size == 0:
            raise DataError(
                f"data.train_path: no sample of {name} is left to train on (data.holdout, "
                "data.too_long); take it out of the list"
            )
    draws = draws_of(sizes.tolist(), repeats, weights or None)
    if 0 in draws.drawn:
        at = draws.drawn.index(0)
        raise DataError(
            f"data.train_path: weight={weights[at]:g} of {samples.names[at]} is no sample of an "
            f"epoch of {draws.epoch_size:,}; raise it, or take the part out of the list"
        )
    return draws
