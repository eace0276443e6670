"""A folder of samples on disk: random access to it. gemoe_ds/data/sample_writer.py writes one."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import threading
from pathlib import Path
from typing import Any

from gemoe_ds.data.dropped import Dropped as Dropped
from gemoe_ds.data.sample_writer import GROUP as GROUP
from gemoe_ds.data.sample_writer import write_samples as write_samples
from gemoe_ds.data.schema import MANIFEST, READ, first_schema, picture_in, sample_of, stored_in
from gemoe_ds.data.shards import ArrowShard, ParquetShard, Shard
from gemoe_ds.data.turn import Message as Message
from gemoe_ds.data.turn import Picture as Picture
from gemoe_ds.data.turn import Sample as Sample
from gemoe_ds.data.turn import Turn as Turn
from gemoe_ds.data.turn import of_turns as of_turns
from gemoe_ds.errors import DataError
from gemoe_ds.files import sha256_of

CACHE_BYTES = 256 * 2**20  # of groups that an open folder keeps in memory


class SampleFolder:
    """Random access to a written folder, from any thread, in bounded memory.

    Row i costs O(log groups), and reading its group unless that is among the `cache_bytes` kept. A
    picture that is stored in another row costs the same again. Threads read side by side.
    """

    def __init__(
        self, path: Path, manifest: dict[str, Any], shards: list[Shard], cache_bytes: int
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self._shards = shards
        self._groups = [
            (shard, group) for shard in shards for group in range(len(shard.group_sizes))
        ]
        self._ends = list(itertools.accumulate(s.group_sizes[g] for s, g in self._groups))
        self._kept: dict[int, Any] = {}  # oldest first; a random order gains nothing from LRU
        self._kept_bytes, self._cache_bytes = 0, cache_bytes
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        number, row = self._place(index)
        shard, _ = self._groups[number]
        try:
            if isinstance(shard, ParquetShard):
                return first_schema(self._group(number), row)
            return sample_of(self._group(number), row, self._picture)
        except (UnicodeDecodeError, TypeError, IndexError) as error:
            raise shard.damaged(f"row {index}: {error}") from error

    def outline(self, index: int) -> Sample:
        """The same without the bytes of its pictures, if their sizes are known: these bytes are
        not read. For one thread at a time."""
        number, row = self._place(index)
        shard, group = self._groups[number]
        if isinstance(shard, ArrowShard):
            try:
                kept = self._kept.get(number)
                sample = sample_of(shard.outline(group) if kept is None else kept, row, None)
            except (UnicodeDecodeError, TypeError) as error:
                raise shard.damaged(f"row {index}: {error}") from error
            if all(picture.width for picture in sample.images):
                return sample
        return self[index]

    def stored_at(self, index: int) -> list[tuple[int, int] | str]:
        """What tells the pictures of a sample from all others: row and place where each is stored,
        or in schema 1 a digest of it. For one thread at a time."""
        number, row = self._place(index)
        shard, group = self._groups[number]
        if isinstance(shard, ArrowShard):
            return [*stored_in(shard.outline(group), row, index)]
        return [hashlib.blake2b(p.data, digest_size=16).hexdigest() for p in self[index].images]

    def _place(self, index: int) -> tuple[int, int]:
        """The group of a row, and its place there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)

    def _picture(self, index: int, place: int) -> bytes:
        number, row = self._place(index)
        return picture_in(self._group(number), row, place)

    def _group(self, number: int) -> Any:
        found = self._kept.get(number)
        if found is not None:
            return found
        shard, group = self._groups[number]
        found = shard.group(group)
        with self._lock:
            if number not in self._kept:  # or another thread was faster
                self._kept[number] = found
                self._kept_bytes += found.nbytes
            while self._kept_bytes > self._cache_bytes and len(self._kept) > 1:
                self._kept_bytes -= self._kept.pop(next(iter(self._kept))).nbytes
        return found


def open_samples(
    path: str | Path, *, verify: bool = False, cache_bytes: int = CACHE_BYTES
) -> SampleFolder:
    """Open a folder; DataError naming the file if one is missing, cut short or (verify) changed."""
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        schema, _ = manifest["schema"], manifest["fingerprint"]
        if schema not in READ:
            known = " and ".join(map(str, READ))
            raise DataError(f"{path}: schema {schema}, this version reads {known}; convert again")
        shards = [(path / s["file"], s["bytes"], s["sha256"]) for s in manifest["shards"]]
        sizes = [s["groups"] if schema > 1 else [] for s in manifest["shards"]]
        counts = [s["num_samples"] for s in manifest["shards"]]
    except OSError as error:
        raise DataError(
            f"{path}: no {MANIFEST} there ({error.strerror}); make it with `gemoe data convert`"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}/{MANIFEST} is damaged ({error!r}); convert again") from error
    if not shards:
        raise DataError(f"{path}/{MANIFEST} is damaged (it lists no shard); convert again")
    if schema > 1 and [sum(of_shard) for of_shard in sizes] != counts:
        raise DataError(f"{path}/{MANIFEST} is damaged (its groups do not add up); convert again")
    for file, size, checksum in shards:
        if not file.is_file():
            raise DataError(f"{file} is missing; convert again")
        if file.stat().st_size != size or (verify and sha256_of(file) != checksum):
            raise DataError(f"{file} is damaged (size or checksum differs); convert again")
    files = [file for file, _, _ in shards]
    return SampleFolder(path, manifest, _opened(path, files, schema, sizes), cache_bytes)


def _opened(path: Path, files: list[Path], schema: int, sizes: list[list[int]]) -> list[Shard]:
    if schema > 1:
        return [ArrowShard(file, of_file) for file, of_file in zip(files, sizes, strict=True)]
    try:
        return [ParquetShard(file) for file in files]
    except (OSError, ValueError) as error:  # pyarrow's are among them
        raise DataError(f"{path}: a shard cannot be read ({error}); convert again") from error
