"""The ids and sources of all samples, without reading anything else of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gemoe_ds.data.mixture import Mixture, SampleList
from gemoe_ds.data.sample import SampleFolder
from gemoe_ds.errors import DataError

MOST = 64  # sources that are told apart
OTHER = "other"


def row_names(samples: SampleList) -> Iterator[tuple[list[str], list[str]]]:
    """Ids and sources of rows that follow each other; "" is the source of who has none."""
    if isinstance(samples, Mixture):
        for folder in samples.folders:
            yield from row_names(folder)
        return
    assert isinstance(samples, SampleFolder), "what is on disk"
    for shard in samples.manifest["shards"]:
        path = samples.path / shard["file"]
        try:
            yield from _of_parquet(path) if path.suffix == ".parquet" else _of_arrow(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is damaged ({error}); convert again") from error


def _of_parquet(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    ids = pq.read_table(path, columns=["id"], use_threads=False, memory_map=True)["id"]
    yield ids.to_pylist(), [""] * len(ids)


def _of_arrow(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as file:
        for number in range(file.num_record_batches):
            batch = file.get_batch(number)
            yield batch["id"].to_pylist(), batch["source"].to_pylist()


@dataclass(frozen=True)
class Sources:
    """Where the samples come from, for the metrics: names, and of each row the number of one."""

    names: tuple[str, ...]
    source_N: np.ndarray  # int16


def sources_of(samples: SampleList) -> Sources | None:
    """The parts of a mixture, or what the samples of a folder carry; None if all carry the same.

    Of more than `MOST` sources the smallest ones are one, called `OTHER`.
    """
    if isinstance(samples, Mixture):
        numbers = np.arange(len(samples.names), dtype=np.int16)
        return Sources(samples.names, np.repeat(numbers, samples.sizes))
    assert isinstance(samples, SampleFolder), "what is on disk"
    if samples.manifest["schema"] == 1:  # which has no sources
        return None
    found: dict[str, int] = {}
    column = [found.setdefault(s, len(found)) for _, some in row_names(samples) for s in some]
    if len(found) < 2:
        return None
    source_N = np.array(column)
    count_S = np.bincount(source_N)
    names = [name or "unnamed" for name in found]
    if len(names) > MOST:
        kept = np.sort(np.argsort(-count_S, kind="stable")[: MOST - 1])
        new_S = np.full(len(names), MOST - 1)
        new_S[kept] = np.arange(MOST - 1)
        source_N, names = new_S[source_N], [*(names[place] for place in kept), OTHER]
    return Sources(tuple(names), source_N.astype(np.int16))
