"""Samples -> a folder on disk: Arrow files and a manifest (gemoe_ds/data/schema.py).

    OUT/shard-00000-of-00003.arrow   rows in groups: what is read at once
    OUT/manifest.json                schema, source, counts, what was dropped and why, sha256s

A folder is written under another name and renamed, so it is whole or absent. Groups are small,
because the training order is random and one row costs reading its group.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from gemoe_ds.data.dropped import MAX_BAD_FRACTION, DropList, Dropped
from gemoe_ds.data.schema import COLUMNS, MANIFEST, SCHEMA, StoredPictures, batch_of, row_of
from gemoe_ds.data.turn import Sample, fault
from gemoe_ds.files import sha256_of, whole_folder

GROUP = 32  # rows of a group at most
GROUP_BYTES = 256 * 2**10  # a group ends when it has so many


@dataclass(frozen=True)
class WrittenShard:
    """A file under its first name, and the rows of its groups."""

    path: Path
    group_sizes: list[int]

    @property
    def num_samples(self) -> int:
        return sum(self.group_sizes)

    def entry(self, name: str) -> dict[str, Any]:
        """Of the manifest."""
        return {
            "file": name,
            "num_samples": self.num_samples,
            "bytes": self.path.stat().st_size,
            "sha256": sha256_of(self.path),
            "groups": self.group_sizes,
        }


def write_samples(
    samples: Iterable[Sample | Dropped],
    out: Path,
    *,
    source: str,
    shard_size: int = 4096,
) -> dict[str, Any]:
    """Write a folder of samples and return its manifest; reads `samples` once, a group at a time.

    A sample that breaks a rule (`turn.fault`) is dropped by name. Raises ConfigError if `out`
    exists, and DataError, leaving nothing behind, if no sample is left or more than
    `MAX_BAD_FRACTION` of the rows were dropped.
    """
    with whole_folder(out) as folder:
        dropped, stored = DropList(), StoredPictures()
        shards: list[WrittenShard] = []
        kept, num_samples = _kept(samples, dropped), 0
        while first := list(itertools.islice(kept, 1)):
            some = itertools.chain(first, itertools.islice(kept, shard_size - 1))
            shards.append(
                write_shard(some, folder / f"part-{len(shards):05d}", num_samples, stored)
            )
            num_samples += shards[-1].num_samples
        dropped.check(source, num_samples + len(dropped), MAX_BAD_FRACTION)
        manifest = manifest_of(shards, dropped, source, {})
        for shard, entry in zip(shards, manifest["shards"], strict=True):
            shard.path.rename(folder / entry["file"])
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return manifest


def manifest_of(
    shards: list[WrittenShard], dropped: DropList, source: str, notes: Mapping[str, int]
) -> dict[str, Any]:
    """Of a folder of these shards, under the names that they will have."""
    names = (f"shard-{index:05d}-of-{len(shards):05d}.arrow" for index in range(len(shards)))
    listed = [shard.entry(name) for shard, name in zip(shards, names, strict=True)]
    fingerprint = hashlib.sha256("".join(s["sha256"] for s in listed).encode()).hexdigest()
    return {
        "schema": SCHEMA,
        "source": source,
        "num_samples": sum(shard.num_samples for shard in shards),
        **dropped.in_manifest(),
        "notes": dict(notes),
        "shards": listed,
        "fingerprint": fingerprint,
    }


def _kept(rows: Iterable[Sample | Dropped], dropped: DropList) -> Iterator[Sample]:
    """The samples; `dropped` takes the other rows."""
    for row in rows:
        if not isinstance(row, Sample):
            dropped.append(row)
        elif (broken := fault(row)) is not None:
            dropped.append(Dropped(row.id, broken, "not a sample"))
        else:
            yield row


def write_shard(
    samples: Iterable[Sample], path: Path, first_row: int, stored: StoredPictures
) -> WrittenShard:
    """One file of rows from `first_row` on; a picture that is `stored` is not stored again."""
    sizes: list[int] = []
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, COLUMNS) as writer:
        for group in _groups(samples, first_row, stored):
            writer.write_batch(batch_of(group))
            sizes.append(len(group))
    return WrittenShard(path, sizes)


def _groups(
    samples: Iterable[Sample], first_row: int, stored: StoredPictures
) -> Iterator[list[dict[str, Any]]]:
    """Rows until they are GROUP, or GROUP_BYTES."""
    group: list[dict[str, Any]] = []
    size = 0
    for number, sample in enumerate(samples, first_row):
        row, more = row_of(sample, number, stored)
        group.append(row)
        size += more
        if len(group) == GROUP or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
