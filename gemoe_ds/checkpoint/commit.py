"""How the files of several ranks become one checkpoint, by what they leave in its folder.

    1. Every writer leaves a note when its files are on disk.
    2. The first rank joins the notes to the manifest.
    3. Every writer reads back an equal part of all files, and leaves a mark if it is whole.
    4. With all marks there, the first rank renames the folder and deletes what is too old.

So nothing is called a checkpoint, and none is deleted for it, before all of it has been read back;
and nobody reads more than its part. No collectives: these are steps of threads.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemoe_ds.checkpoint import manifest
from gemoe_ds.files import write_text

VISIBLE_SECONDS = 120.0  # for a shared file system to show what another rank has written


@dataclass(frozen=True)
class Stages:
    """How far all ranks are, as far as this one knows; `cancel` ends without a checkpoint."""

    all_written: threading.Event = field(default_factory=threading.Event)
    all_checked: threading.Event = field(default_factory=threading.Event)
    cancel: threading.Event = field(default_factory=threading.Event)


def check_part(temporary: Path, share: tuple[int, int], stages: Stages) -> None:
    """Read back this writer's share, (number, writers), once the manifest is there; CheckpointError
    if it is damaged."""
    if _appear([temporary / manifest.MANIFEST], stages.all_written, stages.cancel):
        manifest.verify(temporary, share)
        write_text(temporary / _mark_of(share[0]), "")


def commit_parts(
    temporary: Path,
    final: Path,
    writers: Sequence[int],
    header: dict[str, Any],
    keep: int,
    *,
    is_best: bool = False,
    stages: Stages,
) -> None:
    """Join the notes of the writers, which are ranks, to the manifest, and commit once all of them
    have checked their shares.

    They may be slow; but once they are known to be done their files must appear.
    """
    notes = [temporary / note_of(rank) for rank in sorted(writers)]
    if not _appear(notes, stages.all_written, stages.cancel):
        return
    tensors: dict[str, Any] = {}
    for note in notes:
        tensors |= json.loads(note.read_text(encoding="utf-8"))
        note.unlink()
    content = header | {"tensors": tensors}
    write_text(temporary / manifest.MANIFEST, json.dumps(content, indent=1))
    marks = [temporary / _mark_of(number) for number in range(len(writers))]
    if not _appear(marks, stages.all_checked, stages.cancel):
        return
    for mark in marks:
        mark.unlink()
    manifest.commit(temporary, final, keep, is_best=is_best)


def note_of(rank: int) -> str:
    """The file in which a writer says what it has written."""
    return f".rank-{rank:05d}.json"


def _mark_of(number: int) -> str:
    return f".checked-{number:05d}"


def _appear(files: Sequence[Path], must: threading.Event, cancel: threading.Event) -> bool:
    """Wait for all; False if cancelled. OSError if some do not come although they `must`."""
    waited, pause = 0.0, 0.02
    while missing := [file for file in files if not file.exists()]:
        if cancel.wait(pause):
            return False
        waited += pause if must.is_set() else 0.0
        pause = min(1.5 * pause, 0.5)
        if waited > VISIBLE_SECONDS:
            raise OSError(
                f"{missing[0].name} of another rank does not appear: every rank must see the "
                "same output_dir; put it on a shared file system"
            )
    return True
