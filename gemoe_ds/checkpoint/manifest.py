"""The folder of a checkpoint on disk: find it, verify it, read tensors from it. Files only.

    checkpoints/step-000200/
      weights-00000.safetensors   what trains, float32: all that inference needs
      adam-00000.safetensors      exp_avg/KEY and exp_avg_sq/KEY
      manifest.json               step, identity of the run, and of every tensor its file, shape,
                                  dtype and sha256
    checkpoints/latest            the name of the newest one, moved last
    checkpoints/best              a link to the best one, which stays until there is a better one

Every rank that owns tensors writes its own two files. Frozen weights are never stored; the
identity holds the checksum of the base checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemoe_ds.checkpoint.identity import check_identity
from gemoe_ds.errors import CheckpointError
from gemoe_ds.files import commit_folder, fsync_path, sha256_of, write_text
from gemoe_ds.hf_io.safetensors_reader import INDEX, open_stored, refuse_dead_links

SCHEMA = 2
MANIFEST = "manifest.json"
LATEST = "latest"
BEST = "best"
WEIGHTS, ADAM = "weights", "adam"
# Work in progress and leftovers begin with a dot: no `step-*` is ever half of something.
WRITING, REMOVING = ".writing-", ".removing-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has passed verification. `updates`: those that were not skipped."""

    folder: Path
    step: int
    updates: int
    manifest: dict[str, Any]
    empty_steps: int = 0  # of which no sample could be used

    def tensors(self, kind: str, keys: set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The tensors of `WEIGHTS` or `ADAM`, all or some, on the CPU, file by file."""
        by_file: dict[str, list[str]] = {}
        for key, entry in self.manifest["tensors"].items():
            if entry["file"].startswith(kind) and (keys is None or key in keys):
                by_file.setdefault(entry["file"], []).append(key)
        for name, some in sorted(by_file.items()):
            with _opened(self.folder / name) as file:
                for key in some:
                    yield key, file.get_tensor(key)

    @contextmanager
    def reading(self) -> Iterator[Callable[[str], Tensor]]:
        """A function that reads one of them; the files stay open until the end."""
        with ExitStack() as stack:
            opened: dict[str, Any] = {}

            def read_one(key: str) -> Tensor:
                name = self.manifest["tensors"][key]["file"]
                if name not in opened:
                    opened[name] = stack.enter_context(_opened(self.folder / name))
                found: Tensor = opened[name].get_tensor(key)
                return found

            yield read_one

    def keys(self, kind: str) -> set[str]:
        return {k for k, e in self.manifest["tensors"].items() if e["file"].startswith(kind)}


def sha256(tensor: Tensor) -> str:
    """Of the bytes of a contiguous CPU tensor."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def describe(tensors: dict[str, Tensor], file: str) -> dict[str, dict[str, Any]]:
    """The manifest entries of the tensors of one file."""
    return {
        key: {
            "file": file,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "sha256": sha256(tensor),
        }
        for key, tensor in tensors.items()
    }


def checksum_folder(folder: Path | None) -> str:
    """sha256 over the files of a model folder (names and contents); "none" without one."""
    if folder is None:
        return "none"
    files = files_of(folder)
    return combined_checksum(folder, {path: sha256_of(path) for path in files})


def files_of(folder: Path) -> list[Path]:
    """What counts for the checksum of a model folder."""
    refuse_dead_links(folder)
    files = {p for p in folder.iterdir() if p.suffix in (".json", ".safetensors") and p.is_file()}
    if (folder / INDEX).is_file():  # whose files may be in folders below
        files |= {tensor.file for tensor in open_stored(folder).values()}
    return sorted(files)


def combined_checksum(folder: Path, of_files: Mapping[Path, str]) -> str:
    """That of a folder, from those of its files."""
    digest = hashlib.sha256()
    for path in sorted(of_files):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(of_files[path].encode())
    return digest.hexdigest()


def candidates(output: Path) -> list[Path]:
    """The checkpoints of a run, newest first, whole or not; no copy that a user has put there."""
    found = [p for p in (output / "checkpoints").glob("step-*") if step_of(p) >= 0]
    return sorted(found, key=step_of, reverse=True)


def is_of(folder: Path, output: Path) -> bool:
    """Whether a checkpoint is one of the run in `output`, or a copy beside them."""
    return folder.resolve().parent == (output / "checkpoints").resolve()


def step_of(folder: Path) -> int:
    """The step in a folder's name; -1 for a name that is none of ours."""
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def read(folder: Path) -> Checkpoint:
    """The manifest of a checkpoint; CheckpointError if it is missing or damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no {MANIFEST} there; give a folder such as OUTPUT/checkpoints/step-000200"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema = manifest["schema"]
        if schema != SCHEMA:
            raise CheckpointError(
                f"{folder}: schema {schema}, this version reads {SCHEMA}; resume it with the "
                "version that wrote it"
            )
        step, updates, tensors = manifest["step"], manifest["updates"], manifest["tensors"]
        dict(manifest["identity"])
        for entry in tensors.values():
            entry["file"], entry["shape"], entry["dtype"], entry["sha256"]
        empty = int(manifest.get("empty_steps", 0))
        return Checkpoint(folder, int(step), int(updates), manifest, empty)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{folder}: {MANIFEST} is damaged ({error!r}); use another"
        ) from error


def readers(entries: Mapping[str, dict[str, Any]], count: int) -> dict[str, int]:
    """Which of `count` reads each tensor of a manifest: equal parts of the bytes, file by file."""
    order = [key for _, keys in sorted(_by_file(entries).items()) for key in keys]
    sizes = [num_bytes(entries[key]) for key in order]
    total, before, found = max(sum(sizes), 1), 0, {}
    for key, size in zip(order, sizes, strict=True):
        found[key] = min((2 * before + size) * count // (2 * total), count - 1)
        before += size
    return found


def _by_file(entries: Mapping[str, dict[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key in sorted(entries):
        found.setdefault(entries[key]["file"], []).append(key)
    return found


def num_bytes(entry: dict[str, Any]) -> int:
    """Of a tensor; of one that is described wrongly, any number."""
    dtype = getattr(torch, str(entry["dtype"]), None)
    sizes = [size for size in entry["shape"] if isinstance(size, int)]
    return math.prod(sizes) * getattr(dtype, "itemsize", 1)


def verify(folder: Path, share: tuple[int, int] = (0, 1)) -> Checkpoint:
    """Check every tensor's shape, dtype and bytes; CheckpointError names the first that is wrong.

    With `share` = (rank, ranks) only this rank's part of the bytes is read.
    """
    found = read(folder)
    tensors, files = found.manifest["tensors"], _by_file(found.manifest["tensors"])
    mine = {key for key, reader in readers(tensors, share[1]).items() if reader == share[0]}
    for name, keys in files.items():
        if mine.isdisjoint(keys):
            continue
        with _opened(folder / name) as file:
            if set(file.keys()) != set(keys):
                raise CheckpointError(f"{folder}: {name} holds other tensors than {MANIFEST} says")
            for key in mine.intersection(keys):
                if describe({key: file.get_tensor(key)}, name)[key] != tensors[key]:
                    raise CheckpointError(
                        f"{folder}: {name} is damaged (checksum of {key}); use another checkpoint"
                    )
    return found


def find(
    resume: str,
    output: Path,
    identity: dict[str, Any],
    check: Callable[[Path], Checkpoint] = verify,
    folders: list[Path] | None = None,
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that `resume` means ("none", "auto" or a folder), and why others were skipped.

    "auto" takes the newest one that is whole, and None where there is none at all. A named one
    that is damaged, or one of another run, is a CheckpointError. `folders`: those that "auto" may
    choose from, by default the run's `candidates`.
    """
    if resume == "none":
        return None, []
    if resume != "auto":
        found = check(Path(resume))
        check_identity(found.folder, found.manifest["identity"], identity)
        return found, []
    skipped: list[str] = []
    for folder in candidates(output) if folders is None else folders:
        try:
            found = check(folder)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        check_identity(folder, found.manifest["identity"], identity)
        return found, skipped
    if skipped:
        raise CheckpointError(
            f"{output}: none of {len(skipped)} checkpoints is whole; the newest: {skipped[0]}"
        )
    return None, []


def newest(run: Path) -> Path:
    """The newest whole checkpoint of a run folder, or the checkpoint itself that is given, such as
    RUN/checkpoints/best; CheckpointError if there is none."""
    if (run / MANIFEST).exists():
        return verify(run.resolve()).folder  # `best` will be another one
    found, _ = find("auto", run, {})
    if found is None:
        raise CheckpointError(f"{run}: no checkpoint there; give the output_dir of a training run")
    return found.folder


def commit(temporary: Path, final: Path, keep: int, *, is_best: bool = False) -> None:
    """Make a filled folder that has been verified the newest checkpoint, then delete what is too
    old.

    Renamed after everything in it is on disk, so that a crash at any point leaves either nothing
    or a whole checkpoint; `latest` moves after that.
    """
    root = final.parent
    commit_folder(temporary, final)
    write_text(root / LATEST, final.name)
    fsync_path(root)
    if is_best:
        link = root / f".{BEST}"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        os.replace(link, root / BEST)
        fsync_path(root)
    best = os.path.realpath(root / BEST)
    for old in candidates(root.parent)[keep:]:
        if os.path.realpath(old) != best:
            _remove(old)


def clean(output: Path) -> None:
    """Delete what interrupted saves have left."""
    for pattern in (WRITING, REMOVING):
        for leftover in (output / "checkpoints").glob(f"{pattern}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def set_aside(output: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`: the run goes on from there, and they are of another."""
    moved = []
    for folder in candidates(output):
        if step_of(folder) > step:
            target = folder.with_name(f"aside-{folder.name}")
            if target.exists():
                _remove(target)
            os.replace(folder, target)
            moved.append(target)
    best = output / "checkpoints" / BEST
    if moved and best.is_symlink() and not best.exists():
        best.unlink()
    return moved


def _remove(folder: Path) -> None:
    hidden = folder.with_name(f"{REMOVING}{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)  # at once: no `step-*` is ever half deleted
    shutil.rmtree(hidden, ignore_errors=True)


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: {path.name} is missing; use another checkpoint")
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path.parent}: {path.name} is damaged ({error}); use another checkpoint"
        ) from error
