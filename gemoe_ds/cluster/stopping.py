"""A signal to any rank stops all of them after one and the same step.

SLURM warns before a preemption with SIGTERM and before a time limit with what `--signal` names;
launchers pass signals on to one rank, to some, or one after the other. So a rank only remembers
that it got one, and all agree once a step (`Trainer`). Standard library only: `listen` comes before
the imports that take seconds.
"""

from __future__ import annotations

import signal
from types import FrameType

HEEDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Whether this process was asked to stop, and by what; a second signal changes nothing."""

    def __init__(self) -> None:
        self.by: str | None = None

    def listen(self) -> StopRequest:
        for number in HEEDED:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.by = self.by or signal.Signals(number).name
