"""A signal to any rank stops all of them after one and the same step.

SLURM warns before a preemption with SIGTERM and before a time limit with what `--signal` names;
Ctrl-C is SIGINT. Launchers pass signals on to one rank, to some, or one after the other. So a rank
only remembers that it got one, and all agree once a step (`Trainer`). Standard library only:
`listen` comes before the imports that take seconds.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

HEEDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_ONE_CTRL_C = 1.0  # seconds in which it may arrive twice: from the terminal and from a launcher


class StopRequest:
    """Whether this process was asked to stop, and by what; a second signal changes nothing, but for
    a second Ctrl-C, which ends the process at once."""

    def __init__(self) -> None:
        self.by: str | None = None
        self._interrupted_at: float | None = None

    def listen(self) -> StopRequest:
        for number in HEEDED:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.by = self.by or signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupt()

    def _interrupt(self) -> None:
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            if os.environ.get("RANK", "0") == "0":  # not by print: it may be what is interrupted
                os.write(2, b"\nSIGINT: stops after this step; again: ends at once\n")
        elif now - self._interrupted_at > _ONE_CTRL_C:
            os._exit(128 + signal.SIGINT)
