"""Files and folders that are whole or absent: written under another name, flushed, renamed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemoe_ds.errors import ConfigError, GemoeError, OutputError


def check_new(out: Path) -> None:
    """Raise ConfigError unless the folder `out` can be made; asked before any work is done."""
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists already; choose a new folder or remove it")
    above = next(path for path in out.absolute().parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{out}: {above} is no folder that you may write to")


@contextmanager
def whole_folder(
    out: Path, disk_errors: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[Path]:
    """A temporary folder that becomes `out` if the block succeeds and vanishes if it does not.

    It vanishes too on Ctrl-C and on SIGTERM. After SIGKILL or a power cut `<out>.tmp-<pid>` is
    left; nothing reads it. Raises ConfigError if `out` exists, and OutputError for what the disk
    refuses: the `disk_errors` of the libraries that write.
    """
    check_new(out)
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        with termination_raises():
            temporary.mkdir(parents=True)
            yield temporary
            commit_folder(temporary, out)
    except disk_errors as error:
        if isinstance(error, GemoeError):
            raise
        raise OutputError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing_into(out: Path) -> Iterator[None]:
    """The folder `out` is made if need be; OutputError, in one line, for what the disk refuses."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if isinstance(error, GemoeError):
            raise
        where, why = error.filename or out, error.strerror or error
        raise OutputError(f"{where}: {why}: choose another --out") from error


def commit_folder(temporary: Path, final: Path) -> None:
    """Rename a filled folder once all of it is on disk: a crash leaves nothing or the whole."""
    for path in [*temporary.rglob("*"), temporary]:
        fsync_path(path)
    os.replace(temporary, final)
    fsync_path(final.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: neither a reader nor a crash sees half of it."""
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    fsync_path(partial)
    os.replace(partial, path)


def whole_lines(path: Path) -> list[str]:
    """All lines but a last one that a crash has cut."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line for line in text.splitlines(True) if line[-1] == "\n"]


def step_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every whole line of a file of JSON objects that name their `step`, and its object.

    Those that a crash has damaged are left out, and a line says how many.
    """
    lines = [(line, _step_in(line)) for line in whole_lines(path)]
    found = [(line, entry) for line, entry in lines if entry is not None]
    if damaged := len(lines) - len(found):
        print(f"{path}: {damaged} damaged lines are left out", flush=True)
    return found


def _step_in(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


@contextmanager
def flocked(path: Path, flags: int = os.O_RDONLY) -> Iterator[int | None]:
    """The descriptor of a file or folder that no other process has locked; None if one has.

    The lock ends with the block or the process. Where the file system has no locks, nothing is
    locked. Raises OSError if the path cannot be opened.
    """
    while True:
        descriptor = os.open(path, flags, 0o644)
        try:
            if not _flock(descriptor):
                yield None
                return
            if _is_at(descriptor, path):  # and not removed by the one that had it
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def fsync_path(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def termination_raises() -> Iterator[None]:
    """SIGTERM unwinds the stack, as Ctrl-C does, instead of ending the process on the spot."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield  # signals belong to someone else
        return

    def unwind(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
