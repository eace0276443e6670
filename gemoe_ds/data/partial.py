"""OUT.partial: the finished shards of a conversion that may be killed at any moment.

    OUT.partial/conversion.json   what is converted, and how; another conversion may not go on here
    OUT.partial/part-00000.arrow  4096 samples, say, as they will stand in OUT
    OUT.partial/part-00000.json   its sidecar: how far the source was read, what was dropped

A shard counts once its sidecar is there, which names its checksum. A shard depends on the rows
alone, and on what the shards before it hold, so that whoever goes on writes the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemoe_ds.data.dropped import DropList
from gemoe_ds.data.sample_writer import WrittenShard
from gemoe_ds.data.schema import MANIFEST
from gemoe_ds.errors import DataError, OutputError
from gemoe_ds.files import check_new, commit_folder, flocked, fsync_path, sha256_of, write_text

_IDENTITY = "conversion.json"
Identity = dict[str, Any]


@dataclass(frozen=True)
class RowCounts:
    """What was met in the rows up to a place of the source; one of a shard, or of several."""

    dropped: DropList = field(default_factory=DropList)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, other: RowCounts) -> None:
        self.dropped.add(other.dropped)
        self.notes.update(other.notes)


@dataclass(frozen=True)
class FinishedShard(WrittenShard):
    """A shard with its sidecar."""

    num_rows: int  # of the source, from its first one to the last one of this shard
    counts: RowCounts
    contents: list[str]  # digests of its samples, if duplicates are looked for
    size: int
    sha256: str

    def entry(self, name: str) -> dict[str, Any]:
        """Of the manifest, without reading the file again."""
        found = {"file": name, "num_samples": self.num_samples, "bytes": self.size}
        return found | {"sha256": self.sha256, "groups": self.group_sizes}


class PartialFolder:
    """The folder while it grows; see `open_partial`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shards: list[FinishedShard] = []

    @property
    def num_rows(self) -> int:
        """Rows of the source that the finished shards account for."""
        return self.shards[-1].num_rows if self.shards else 0

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    def next_path(self) -> Path:
        return self.path / f"part-{len(self.shards):05d}.arrow"

    def finish(
        self, shard: WrittenShard, num_rows: int, counts: RowCounts, contents: list[str]
    ) -> FinishedShard:
        """Put a shard on disk for good: it, then its sidecar."""
        fsync_path(shard.path)
        size, sha256 = shard.path.stat().st_size, sha256_of(shard.path)
        finished = FinishedShard(
            shard.path, shard.group_sizes, num_rows, counts, contents, size, sha256
        )
        said = {"groups": shard.group_sizes, "num_rows": num_rows, "bytes": size, "sha256": sha256}
        said |= {"notes": counts.notes, "dropped": counts.dropped.state(), "contents": contents}
        write_text(shard.path.with_suffix(".json"), json.dumps(said))
        fsync_path(self.path)
        self.shards.append(finished)
        return finished

    def read_finished(self) -> None:
        """Find the shards that are whole; what is behind the first that is not is removed."""
        for sidecar in sorted(self.path.glob("part-*.json")):
            if sidecar != self.next_path().with_suffix(".json"):
                break
            with suppress(OSError, ValueError, KeyError, TypeError):
                said = json.loads(sidecar.read_text(encoding="utf-8"))
                counts = RowCounts(DropList.of_state(said["dropped"]), Counter(said["notes"]))
                path, size, sha256 = self.next_path(), said["bytes"], said["sha256"]
                if path.stat().st_size == size and sha256_of(path) == sha256:
                    rest = (said["num_rows"], counts, said["contents"], size, sha256)
                    self.shards.append(FinishedShard(path, said["groups"], *rest))
                    continue
            break
        kept = {shard.path.stem for shard in self.shards}
        for path in self.path.iterdir():
            if path.stem not in kept and path.name != _IDENTITY:
                path.unlink()

    def commit(self, manifest: dict[str, Any], out: Path) -> None:
        """The whole folder under its own name."""
        write_text(self.path / MANIFEST, json.dumps(manifest, indent=1))
        self.complete(out)

    @property
    def is_complete(self) -> bool:
        """Whether all that is missing is the names."""
        return (self.path / MANIFEST).is_file()

    def complete(self, out: Path) -> dict[str, Any]:
        """Give the files their names, as the manifest has them; begun before, it goes on."""
        manifest: dict[str, Any] = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        for index, entry in enumerate(manifest["shards"]):
            part = self.path / f"part-{index:05d}.arrow"
            if part.is_file():
                part.rename(self.path / entry["file"])
        for path in self.path.glob("part-*.json"):
            path.unlink()
        commit_folder(self.path, out)
        (out / _IDENTITY).unlink()
        return manifest


@contextmanager
def open_partial(out: Path, identity: Identity) -> Iterator[PartialFolder]:
    """OUT.partial with what an earlier start of the same conversion has finished.

    However the block ends, finished shards stay; a folder without any is removed. ConfigError if
    `out` exists, DataError if another process or another conversion has this folder, OutputError
    for what the disk refuses.
    """
    check_new(out)
    partial = PartialFolder(out.with_name(f"{out.name}.partial"))
    try:
        partial.path.mkdir(parents=True, exist_ok=True)
        with _locked(partial.path):
            _check_identity(partial.path, identity)
            if not partial.is_complete:
                partial.read_finished()
            try:
                yield partial
            finally:
                _tidy(partial)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        stays = f"; {len(partial.shards)} finished shards stay in {partial.path}"
        raise OutputError(
            f"{out} cannot be written: {error}{stays if partial.shards else ''}"
        ) from error


def _tidy(partial: PartialFolder) -> None:
    if not partial.path.is_dir() or partial.is_complete:
        return
    if not partial.shards:
        shutil.rmtree(partial.path, ignore_errors=True)
    with suppress(OSError):
        partial.next_path().unlink()


def _check_identity(folder: Path, identity: Identity) -> None:
    file = folder / _IDENTITY
    known = json.loads(json.dumps(identity))  # as it is read back: lists for tuples
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if any(not path.name.startswith(".") for path in folder.iterdir()):  # of `write_text`
            raise DataError(
                f"{folder} holds something else than a conversion; choose another --out, or move it"
            ) from None
        write_text(file, json.dumps(identity, indent=1))
        return
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}); remove {folder}") from None
    if different := [key for key in {**found, **known} if found.get(key) != known.get(key)]:
        raise DataError(
            f"{folder} holds a conversion of {_differs(different[0], found, known)}; give the same "
            f"command to go on with it, another --out, or remove {folder} to begin anew"
        )


def _differs(key: str, found: Identity, known: Identity) -> str:
    if key == "files":
        return "the source as it was: its files have changed since"
    was, now = (json.dumps(said.get(key))[:80] for said in (found, known))
    return f"another command: {key} was {was}, and is {now}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """DataError if another process has the folder; it is free again when a process dies."""
    with flocked(folder) as descriptor:
        if descriptor is None:
            raise DataError(
                f"{folder}: another process is converting into it; wait for it, or choose another "
                "--out"
            )
        yield


def fingerprint_of(files: Iterable[Path]) -> list[list[Any]]:
    """Name, size and time of each: what changes if a source does."""
    stats = ((file, file.stat()) for file in files)
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats]
