"""Reading goes on in a thread of its own while what was read before is on its way to others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gemoe_ds.errors import CheckpointError

_OFTEN = 0.05  # seconds
_AHEAD = 64  # steps: what is read may wait in memory of its own


class ReadAhead:
    """Runs through `steps`. After a CheckpointError, which is `problem` then, nothing is read."""

    def __init__(self, steps: Iterator[None]) -> None:
        self.steps, self.problem = steps, ""

    def step(self) -> None:
        """Returns once the next step is done, or will not be."""
        try:
            next(self.steps, None)
        except CheckpointError as error:
            self.problem = str(error)


class _InThread(ReadAhead):
    def __init__(self, steps: Iterator[None]) -> None:
        super().__init__(steps)
        self.failed: BaseException | None = None
        self.done, self.room = threading.Semaphore(0), threading.Semaphore(_AHEAD)
        self.ends = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def step(self) -> None:
        while not self.done.acquire(timeout=_OFTEN):
            if self.failed:
                raise self.failed
            if self.problem or not self.thread.is_alive():
                return
        self.room.release()

    def _run(self) -> None:
        try:
            for _ in self.steps:
                self.done.release()
                self.room.acquire()
                if self.ends.is_set():
                    return
        except CheckpointError as error:
            self.problem = str(error)
        except BaseException as error:
            self.failed = error


@contextmanager
def reading(steps: Iterator[None], *, ahead: bool) -> Iterator[ReadAhead]:
    """Ahead of what is asked for, or step by step."""
    if not ahead:
        yield ReadAhead(steps)
        return
    reader = _InThread(steps)
    reader.thread.start()
    try:
        yield reader
    finally:
        reader.ends.set()
        reader.room.release()
        reader.thread.join()
