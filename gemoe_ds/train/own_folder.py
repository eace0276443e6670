"""One run at a time writes into an output_dir: the first rank holds a lock while it lasts.

The lock dies with its process. Where the file system has none, or the folder cannot be made,
nothing is locked, and what follows says what is wrong.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from gemoe_ds.engine.world import World, broadcast_from_first
from gemoe_ds.errors import ConfigError
from gemoe_ds.files import flocked

LOCK = ".lock"  # in it: who has the folder
_PATIENCE = 300.0  # seconds: until a file system has noticed that the host of a lock is gone


@contextmanager
def own_folder(output: Path, world: World) -> Iterator[None]:
    """ConfigError on all ranks if another process has the folder. Collective.

    A job that SLURM has requeued waits for the one that it follows. If the run writes nothing, a
    folder that was made for the lock goes again.
    """
    with ExitStack() as stack:
        broadcast_from_first(lambda: _enter(stack, output), world)
        yield


def _enter(stack: ExitStack, output: Path) -> None:
    end = time.monotonic() + (_PATIENCE if os.environ.get("SLURM_RESTART_COUNT") else 0.0)
    while True:
        try:
            return stack.enter_context(_held(output))
        except ConfigError:
            if time.monotonic() >= end:
                raise
        time.sleep(1.0)


@contextmanager
def _held(output: Path) -> Iterator[None]:
    path = output / LOCK
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    with ExitStack() as stack:
        with suppress(OSError):
            output.mkdir(parents=True, exist_ok=True)
            descriptor = stack.enter_context(flocked(path, os.O_RDWR | os.O_CREAT))
            if descriptor is None:
                raise _in_use(output)
            stack.callback(_leave, path, made)  # also where the disk has no room for the name
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on host {socket.gethostname()}\n".encode())
        yield


def _leave(path: Path, made: list[Path]) -> None:
    """Before the lock is given up, so that it is nobody else's file that goes."""
    with suppress(OSError):
        path.unlink()
        for folder in made:
            folder.rmdir()  # an error if something is in it


def _in_use(output: Path) -> ConfigError:
    who = ""
    with suppress(OSError):  # it has just gone
        who = (output / LOCK).read_text(encoding="utf-8", errors="replace").strip()
    return ConfigError(
        f"output_dir={output} is in use by {who or 'another process'}; wait for its end, or choose "
        f"another folder; if that process is gone, remove {output / LOCK}"
    )
