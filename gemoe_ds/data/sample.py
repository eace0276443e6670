"""The one on-disk schema: parquet shards of conversations and images, and a manifest.

    OUT/shard-00000-of-00003.parquet   columns id, image (bytes or null), turns [{human, gpt, kind}]
    OUT/manifest.json                  schema, source, counts, what was dropped and why, sha256s

A folder is written under another name and renamed, so it is whole or absent. A shard is cut into
small row groups, because the training order is random and one row costs reading its group.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gemoe_ds.data.dropped import DropList, Dropped
from gemoe_ds.data.turn import Sample as Sample
from gemoe_ds.data.turn import Turn as Turn
from gemoe_ds.errors import DataError
from gemoe_ds.files import sha256_of, whole_folder

SCHEMA = 1
MANIFEST = "manifest.json"
GROUP = 32  # rows that are read together
CACHE_BYTES = 256 * 2**20  # of groups that an open folder keeps in memory

_TURN = pa.struct([("human", pa.string()), ("gpt", pa.string()), ("kind", pa.string())])
_COLUMNS = pa.schema([("id", pa.string()), ("image", pa.binary()), ("turns", pa.list_(_TURN))])


def write_samples(
    samples: Iterable[Sample | Dropped],
    out: Path,
    *,
    source: str,
    shard_size: int = 4096,
    max_bad_fraction: float = 0.2,
    notes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Write a folder of samples and return its manifest; reads `samples` once, a group at a time.

    Raises ConfigError if `out` exists, and DataError, leaving nothing behind, if no sample is left
    or more than `max_bad_fraction` of the rows were dropped. `notes`, counted while the samples
    are read, go into the manifest.
    """
    with whole_folder(out) as folder:
        dropped = DropList()
        shards: list[tuple[Path, int]] = []
        kept = _kept(samples, dropped)
        while first := list(itertools.islice(kept, 1)):
            path = folder / f"part-{len(shards):05d}"
            rest = itertools.islice(kept, shard_size - 1)
            shards.append((path, _write_shard(itertools.chain(first, rest), path)))
        num_samples = sum(count for _, count in shards)
        dropped.check(source, num_samples + len(dropped), max_bad_fraction)
        listed: list[dict[str, Any]] = []
        for index, (path, count) in enumerate(shards):
            final = folder / f"shard-{index:05d}-of-{len(shards):05d}.parquet"
            path.rename(final)
            listed.append(
                {
                    "file": final.name,
                    "num_samples": count,
                    "bytes": final.stat().st_size,
                    "sha256": sha256_of(final),
                }
            )
        fingerprint = hashlib.sha256("".join(s["sha256"] for s in listed).encode()).hexdigest()
        manifest = {
            "schema": SCHEMA,
            "source": source,
            "num_samples": num_samples,
            **dropped.in_manifest(),
            "notes": dict(notes or {}),
            "shards": listed,
            "fingerprint": fingerprint,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return manifest


def _kept(rows: Iterable[Sample | Dropped], dropped: DropList) -> Iterator[Sample]:
    """The samples; `dropped` takes the other rows."""
    for row in rows:
        if isinstance(row, Sample):
            yield row
        else:
            dropped.append(row)


def _write_shard(samples: Iterator[Sample], path: Path) -> int:
    count = 0
    with pq.ParquetWriter(path, _COLUMNS, use_dictionary=False, write_statistics=False) as writer:
        while group := list(itertools.islice(samples, GROUP)):
            rows = [
                {"id": s.id, "image": s.image, "turns": [asdict(t) for t in s.turns]} for s in group
            ]
            writer.write_table(pa.Table.from_pylist(rows, _COLUMNS))
            count += len(group)
    return count


class SampleFolder:
    """Random access to a written folder, from any thread, in bounded memory.

    Row i costs O(log groups), and reading its group unless that is among the `cache_bytes` kept.
    Threads read side by side, each with a reader of its own.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], cache_bytes: int) -> None:
        self.path = path
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self._names = [shard["file"] for shard in manifest["shards"]]
        first = [pq.ParquetFile(path / name, memory_map=True) for name in self._names]
        self._footers = [reader.metadata for reader in first]
        self._idle = [[reader] for reader in first]  # a shard's readers that no thread uses now
        self._groups = [
            (shard, group)
            for shard, footer in enumerate(self._footers)
            for group in range(footer.num_row_groups)
        ]
        sizes = (self._footers[s].row_group(g).num_rows for s, g in self._groups)
        self._ends = list(itertools.accumulate(sizes))
        self._kept: dict[int, pa.Table] = {}  # oldest first; a random order gains nothing from LRU
        self._kept_bytes, self._cache_bytes = 0, cache_bytes
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        table = self._kept.get(number)
        if table is None:
            table = self._read(number)
        row = index - (self._ends[number - 1] if number else 0)
        turns = table["turns"][row].as_py()
        return Sample(
            table["id"][row].as_py(),
            table["image"][row].as_py(),
            tuple(Turn(t["human"], t["gpt"], t["kind"]) for t in turns),
        )

    def _read(self, number: int) -> pa.Table:
        shard, group = self._groups[number]
        path = self.path / self._names[shard]
        with self._lock:
            reader = self._idle[shard].pop() if self._idle[shard] else None
        try:
            if reader is None:
                reader = pq.ParquetFile(path, metadata=self._footers[shard], memory_map=True)
            table = reader.read_row_group(group, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is damaged ({error}); convert again") from error
        with self._lock:
            self._idle[shard].append(reader)
            if number not in self._kept:  # or another thread was faster
                self._kept[number] = table
                self._kept_bytes += table.nbytes
            while self._kept_bytes > self._cache_bytes and len(self._kept) > 1:
                self._kept_bytes -= self._kept.pop(next(iter(self._kept))).nbytes
        return table


def open_samples(
    path: str | Path, *, verify: bool = False, cache_bytes: int = CACHE_BYTES
) -> SampleFolder:
    """Open a folder; DataError naming the file if one is missing, cut short or (verify) changed."""
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        shards = [(path / s["file"], s["bytes"], s["sha256"]) for s in manifest["shards"]]
        schema, _ = manifest["schema"], manifest["fingerprint"]
    except OSError as error:
        raise DataError(
            f"{path}: no {MANIFEST} there ({error.strerror}); make it with `gemoe data convert`"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}/{MANIFEST} is damaged ({error!r}); convert again") from error
    if schema != SCHEMA:
        raise DataError(f"{path}: schema {schema}, this version reads {SCHEMA}; convert again")
    if not shards:
        raise DataError(f"{path}/{MANIFEST} is damaged (it lists no shard); convert again")
    for file, size, checksum in shards:
        if not file.is_file():
            raise DataError(f"{file} is missing; convert again")
        if file.stat().st_size != size or (verify and sha256_of(file) != checksum):
            raise DataError(f"{file} is damaged (size or checksum differs); convert again")
    try:
        return SampleFolder(path, manifest, cache_bytes)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: a shard cannot be read ({error}); convert again") from error
