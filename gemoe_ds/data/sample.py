"""The one on-disk schema: parquet shards of conversations and images, and a manifest.

    OUT/shard-00000-of-00003.parquet   columns id, image (bytes or null), turns [{human, gpt, kind}]
    OUT/manifest.json                  schema, source, counts, what was dropped and why, sha256s

A folder is written under another name and renamed, so it is whole or absent.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gemoe_ds.errors import DataError

SCHEMA = 1
MANIFEST = "manifest.json"
LISTED_DROPS = 1000

_TURN = pa.struct([("human", pa.string()), ("gpt", pa.string()), ("kind", pa.string())])
_COLUMNS = pa.schema([("id", pa.string()), ("image", pa.binary()), ("turns", pa.list_(_TURN))])


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `kind` groups questions in evaluation, if the source has it."""

    human: str
    gpt: str
    kind: str | None = None


@dataclass(frozen=True)
class Sample:
    """A conversation, about an image (its encoded bytes, as they were found) or about none."""

    id: str
    image: bytes | None
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Dropped:
    """A source row that was left out, and why."""

    id: str
    reason: str


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` if the block succeeds and vanishes if it does not."""
    if out.exists():
        raise DataError(f"{out} exists already; remove it or choose another folder")
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_samples(
    samples: Iterable[Sample | Dropped],
    out: Path,
    *,
    source: str,
    shard_size: int = 4096,
    max_bad_fraction: float = 0.2,
) -> dict[str, Any]:
    """Write a folder of samples and return its manifest; reads `samples` once, a shard at a time.

    Raises DataError, and leaves nothing behind, if `out` exists, if no sample is left, or if more
    than `max_bad_fraction` of the rows were dropped.
    """
    with whole_folder(out) as folder:
        dropped: list[Dropped] = []
        shards: list[tuple[Path, int]] = []
        kept = (row for row in samples if isinstance(row, Sample) or dropped.append(row))
        while batch := list(itertools.islice(kept, shard_size)):
            path = folder / f"part-{len(shards):05d}"
            rows = [
                {"id": s.id, "image": s.image, "turns": [asdict(t) for t in s.turns]} for s in batch
            ]
            pq.write_table(pa.Table.from_pylist(rows, _COLUMNS), path)
            shards.append((path, len(batch)))
        num_samples = sum(count for _, count in shards)
        total = num_samples + len(dropped)
        example = f"; first: {dropped[0].id}: {dropped[0].reason}" if dropped else ""
        if not num_samples:
            raise DataError(f"{source}: none of {total} rows can be used{example}")
        if len(dropped) > max_bad_fraction * total:
            raise DataError(
                f"{source}: {len(dropped)} of {total} rows cannot be used, more than "
                f"{max_bad_fraction:.0%} (--max-bad-fraction){example}"
            )
        listed = []
        for index, (path, count) in enumerate(shards):
            final = folder / f"shard-{index:05d}-of-{len(shards):05d}.parquet"
            path.rename(final)
            listed.append(
                {
                    "file": final.name,
                    "num_samples": count,
                    "bytes": final.stat().st_size,
                    "sha256": _sha256(final),
                }
            )
        fingerprint = hashlib.sha256("".join(s["sha256"] for s in listed).encode()).hexdigest()
        manifest = {
            "schema": SCHEMA,
            "source": source,
            "num_samples": num_samples,
            "num_dropped": len(dropped),
            "dropped": [asdict(d) for d in dropped[:LISTED_DROPS]],
            "shards": listed,
            "fingerprint": fingerprint,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return manifest


class SampleFolder:
    """Random access to a written folder; shards are memory-mapped, row i is O(log shards)."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self._tables = [
            pq.read_table(path / shard["file"], memory_map=True) for shard in manifest["shards"]
        ]
        self._ends = list(itertools.accumulate(table.num_rows for table in self._tables))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect.bisect_right(self._ends, index)
        table = self._tables[shard]
        row = index - (self._ends[shard - 1] if shard else 0)
        turns = table["turns"][row].as_py()
        return Sample(
            table["id"][row].as_py(),
            table["image"][row].as_py(),
            tuple(Turn(t["human"], t["gpt"], t["kind"]) for t in turns),
        )


def open_samples(path: str | Path, *, verify: bool = False) -> SampleFolder:
    """Open a folder; DataError naming the file if one is missing, cut short or (verify) changed."""
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        shards = [(path / s["file"], s["bytes"], s["sha256"]) for s in manifest["shards"]]
        schema = manifest["schema"]
    except OSError as error:
        raise DataError(
            f"{path}: no {MANIFEST} there ({error.strerror}); make it with data_prep/"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}/{MANIFEST} is damaged ({error!r}); convert again") from error
    if schema != SCHEMA:
        raise DataError(f"{path}: schema {schema}, this version reads {SCHEMA}; convert again")
    for file, size, checksum in shards:
        if not file.is_file():
            raise DataError(f"{file} is missing; convert again")
        if file.stat().st_size != size or (verify and _sha256(file) != checksum):
            raise DataError(f"{file} is damaged (size or checksum differs); convert again")
    try:
        return SampleFolder(path, manifest)
    except pa.ArrowException as error:
        raise DataError(f"{path}: a shard cannot be read ({error}); convert again") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
