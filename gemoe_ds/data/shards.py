"""The files of a folder of samples, group by group: read by many threads side by side.

A file of schema 2 is an Arrow file (IPC, Feather version 2), a group one of its record batches. Its
footer takes 24 bytes a group; one of a parquet file, in memory, about 1 KB for each of 11 columns,
1.7 GB in every process for 665k samples in groups of four. Schema 1 is parquet.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gemoe_ds.errors import DataError

_BROKEN = (pa.ArrowException, OSError)


class Shard(ABC):
    """One file. `group_sizes`: rows of each of its groups."""

    group_sizes: list[int]

    def __init__(self, path: Path) -> None:
        self.path = path
        self._idle: list[Any] = []  # readers that no thread uses now
        self._lock = threading.Lock()

    def group(self, number: int) -> Any:
        """A group in memory, with a reader that no other thread has; DataError if damaged."""
        with self._lock:
            reader = self._idle.pop() if self._idle else None
        try:
            if reader is None:
                reader = self._open()
            found = self._read(reader, number)
        except _BROKEN as error:
            raise self.damaged(str(error)) from error
        with self._lock:
            self._idle.append(reader)
        return found

    def damaged(self, why: str) -> DataError:
        return DataError(f"{self.path} is damaged ({why}); convert again")

    @abstractmethod
    def _open(self) -> Any:
        """A reader of the file."""

    @abstractmethod
    def _read(self, reader: Any, number: int) -> Any: ...


class ArrowShard(Shard):
    """Of schema 2. What the sizes of its groups are is in the manifest."""

    def __init__(self, path: Path, group_sizes: list[int]) -> None:
        super().__init__(path)
        self.group_sizes = group_sizes
        self._mapped: Any = None

    def _open(self) -> pa.RecordBatchFileReader:
        # Not mapped: a page that comes from a slow disk would stop all threads, not this one alone.
        return pa.ipc.open_file(pa.OSFile(str(self.path)))

    def _read(self, reader: Any, number: int) -> pa.RecordBatch:
        return self._checked(reader.get_batch(number), number)

    def outline(self, number: int) -> pa.RecordBatch:
        """The group, of which only what is looked at is read from the disk."""
        try:
            if self._mapped is None:
                self._mapped = pa.ipc.open_file(pa.memory_map(str(self.path)))
            return self._checked(self._mapped.get_batch(number), number)
        except _BROKEN as error:
            raise self.damaged(str(error)) from error

    def _checked(self, batch: pa.RecordBatch, number: int) -> pa.RecordBatch:
        if batch.num_rows != self.group_sizes[number]:
            raise self.damaged(f"group {number} has {batch.num_rows} rows, the manifest says "
                               f"{self.group_sizes[number]}")  # fmt: skip
        batch.validate()
        return batch


class ParquetShard(Shard):
    """Of schema 1; its footer is read once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        first = pq.ParquetFile(path, memory_map=True)
        self._idle.append(first)
        self._footer = first.metadata
        groups = range(self._footer.num_row_groups)
        self.group_sizes = [self._footer.row_group(group).num_rows for group in groups]

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path, metadata=self._footer, memory_map=True)

    def _read(self, reader: Any, number: int) -> pa.Table:
        return reader.read_row_group(number, use_threads=False)
