"""Steps side by side: each result is kept as it ends; a failed step stops only what needs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.steps import Bar, Progress, Step, environment

POLL = 0.2  # seconds
INTERRUPTED = 130  # exit code
TAIL = 3  # lines of a failed step's log that are shown


class Pool:
    """Runs up to `width` steps at a time, in order as far as what they need is done."""

    def __init__(self, steps: Sequence[Step], progress: Progress, width: int, logs: Path) -> None:
        self.progress, self.width, self.logs = progress, width, logs
        self.waiting = [step for step in steps if not progress.is_done(step)]
        self.bar = Bar(steps, self.waiting, width)
        self.running: dict[str, tuple[Step, subprocess.Popen[bytes], float]] = {}
        self.failed: list[Step] = []  # with those that needed one of them
        if len(self.waiting) < len(steps):
            print(f"== {len(steps) - len(self.waiting)} of {len(steps)} runs are done already")

    def run(self) -> int:
        """Exit code: 0, 1 if any step failed, 130 if it was interrupted."""
        if self.waiting:
            print(self.bar.at_start(), flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what is running, too
        try:
            while self.waiting or self.running:
                while len(self.running) < self.width and (step := self._next()):
                    self._start(step)
                time.sleep(POLL)
                self._collect()
        except KeyboardInterrupt:
            print("\n== interrupted; run the same command to continue from here", flush=True)
            return INTERRUPTED
        finally:
            self._end()
        for step in self.failed:
            print(f"== not done: {step.name}; its log: {self._log(step)}", file=sys.stderr)
        return 1 if self.failed else 0

    def _next(self) -> Step | None:
        """The first step that waits for no other; what waits for a failed one has failed too."""
        lost = {step.name for step in self.failed}
        for step in [step for step in self.waiting if lost & set(step.needs)]:
            self.waiting.remove(step)
            self.failed.append(step)
        busy = {step.name for step in self.waiting} | set(self.running)
        ready = (step for step in self.waiting if not busy & set(step.needs))
        return next(ready, None)

    def _start(self, step: Step) -> None:
        self.waiting.remove(step)
        self.progress.begin(step)
        self.logs.mkdir(parents=True, exist_ok=True)
        alone = {"OMP_NUM_THREADS": "1"}
        with self._log(step).open("wb") as log:
            process = subprocess.Popen(
                step.command,
                env=environment(step.command) | alone,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.running[step.name] = step, process, time.monotonic()

    def _collect(self) -> None:
        for name, (step, process, begun) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[name]
            if process.returncode == 0:
                self.progress.finish(step)
            else:
                self.failed.append(step)
                lines = self._log(step).read_text(errors="replace").splitlines()
                print("\n".join([f"== {name} failed:", *lines[-TAIL:]]), file=sys.stderr)
            self.bar.finish(step)
            print(self.bar.after(step, time.monotonic() - begun), flush=True)

    def _end(self) -> None:
        """Ends what this pool has started and is still running."""
        for _, process, _ in self.running.values():
            process.terminate()
        for _, process, _ in self.running.values():
            process.wait()

    def _log(self, step: Step) -> Path:
        return self.logs / f"{step.name}.log"


def cores() -> int:
    return len(os.sched_getaffinity(0))
