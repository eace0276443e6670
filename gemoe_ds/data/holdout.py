"""Samples that are never trained on: chosen by a hash of each one's id and source alone.

So they are the same on any machine, in whatever order or folder they stand, and however many others
there are (a share; a number takes those of the smallest hashes). Shapes: N samples, H held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from gemoe_ds.data.mixture import Mixture, MixturePart, SampleList, Subset, open_training
from gemoe_ds.data.row_names import row_names
from gemoe_ds.data.sample import open_samples
from gemoe_ds.errors import DataError


def hash_of(sample_id: str, source: str) -> int:
    """From 0 to 2**64 - 1."""
    said = f"{len(source)} {source} {sample_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big")


def held_out_rows(samples: SampleList, holdout: float) -> np.ndarray:
    """The rows that `data.holdout` holds out, int64 [H]; DataError if none or all are.

    Samples of one id and source are held out together, or not at all. They stand in the order of
    their hashes, so that the first of them are some of all.
    """
    hashes = (
        hash_of(sample_id, source)
        for ids, sources in row_names(samples)
        for sample_id, source in zip(ids, sources, strict=True)
    )
    hash_N = np.fromiter(hashes, np.uint64, len(samples))
    if holdout < 1:
        is_held_N = hash_N < np.uint64(int(holdout * 2**64))
    else:
        number = min(int(holdout), len(hash_N))
        is_held_N = hash_N <= np.partition(hash_N, number - 1)[number - 1]
    found = np.flatnonzero(is_held_N)
    if len(found) in (0, len(hash_N)):
        none_or_all = "none" if len(found) == 0 else "all"
        raise DataError(
            f"{samples.path}: data.holdout={holdout:g} holds out {none_or_all} of "
            f"{len(hash_N):,} samples ({len(np.unique(hash_N)):,} of different id or source); "
            "choose another number or share, or give data.validation_path"
        )
    return found[np.argsort(hash_N[found], kind="stable")]


def held_out(samples: SampleList, row_H: np.ndarray, holdout: float) -> Subset:
    """The samples of these rows."""
    return Subset(samples, row_H, f"data.holdout={holdout:g} of {samples.path}")


def open_held_out(
    validation_path: str | None, holdout: float, train_path: str | Sequence[MixturePart]
) -> SampleList:
    """What a run validates on: a folder, or what it holds out; its training data if neither.

    Those of a mixture are shuffled: the first of them are some of all parts.
    """
    if validation_path is not None:
        return open_samples(validation_path)
    samples = open_training(train_path)
    if holdout:
        return held_out(samples, held_out_rows(samples, holdout), holdout)
    if isinstance(samples, Mixture):
        row_N = np.random.default_rng(0).permutation(len(samples))
        return Subset(samples, row_N, samples.path)
    return samples
