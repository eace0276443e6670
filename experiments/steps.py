"""Commands in a row: a finished one is skipped when the row runs again, a changed one starts anew.

An interrupted training step goes on from its newest checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from gemoe_ds.config.load import read_recipe
from gemoe_ds.files import write_text


@dataclass(frozen=True)
class Step:
    """One command. `seconds` is what it takes on 2 CPU cores, for the estimate of what is left."""

    name: str
    command: tuple[str, ...]
    output: Path  # what it makes; removed before the step starts anew
    seconds: int
    needs: tuple[str, ...] = ()  # steps whose outcome it reads
    recipe: Path | None = None
    resumable: bool = False  # continues by itself from what an interrupted try has left


class Progress:
    """What has been done, in `folder`: one small JSON a step, replaced atomically."""

    def __init__(self, folder: Path, steps: Sequence[Step]) -> None:
        self.folder = folder
        self.fingerprints: dict[str, str] = {}
        for step in steps:  # a step comes after those that it needs
            parts = [*step.command, *(self.fingerprints[name] for name in step.needs)]
            if step.recipe:
                parts.append(json.dumps(read_recipe(step.recipe), sort_keys=True))
            self.fingerprints[step.name] = hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def is_done(self, step: Step) -> bool:
        return self._state(step) == "done" and step.output.exists()

    def begin(self, step: Step) -> None:
        """Note the start; what an older try has left stays only if the step can continue it."""
        if not (step.resumable and self._state(step) in ("started", "done")):
            _remove(step.output)
        self._write(step, "started")

    def finish(self, step: Step) -> None:
        self._write(step, "done")

    def _state(self, step: Step) -> str | None:
        """The state that was written for this very command and these inputs."""
        try:
            written = json.loads((self.folder / f"{step.name}.json").read_text())
        except (OSError, ValueError):
            return None
        same = written.get("fingerprint") == self.fingerprints[step.name]
        return str(written.get("state")) if same else None

    def _write(self, step: Step, state: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"state": state, "fingerprint": self.fingerprints[step.name]}
        text = json.dumps(record | {"command": shlex.join(step.command)})
        write_text(self.folder / f"{step.name}.json", text)


def run_steps(steps: Sequence[Step], progress: Progress) -> int:
    """Run what is not done yet, in order; the exit code of the first step that fails, or 0."""
    todo = [step for step in steps if not progress.is_done(step)]
    if len(todo) < len(steps):
        print(f"== {len(steps) - len(todo)} of {len(steps)} steps are done already", flush=True)
    bar = Bar(steps, todo)
    for step in todo:
        print(f"\n{bar.before(step)}\n$ {shlex.join(step.command)}", flush=True)
        progress.begin(step)
        try:
            code = subprocess.run(step.command, env=environment(step.command)).returncode
        except KeyboardInterrupt:
            print("\n== interrupted; run the same command to continue from here", flush=True)
            return 130
        if code != 0:
            print(
                f"== step {step.name} failed (exit code {code}); finished steps are kept, "
                "run the same command to continue from here",
                file=sys.stderr,
                flush=True,
            )
            return code
        progress.finish(step)
        bar.finish(step)
    print(f"\n{bar.at_end()}", flush=True)
    return 0


def list_or_run(
    steps: Sequence[Step], folder: Path, *, list_only: bool, report: Path | None
) -> int:
    """Print the commands, or run them with their progress in `folder`; an exit code."""
    if list_only:
        print("\n".join(shlex.join(step.command) for step in steps))
        return 0
    code = run_steps(steps, Progress(folder, steps))
    if code == 0 and report is not None:
        print(f"   report      {report}/report.md")
        print(f"   figures     {report}/figures/")
    return code


class Timed(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def seconds(self) -> int:
        """On two cores."""


class Bar:
    """How far all steps are, by the seconds that they are said to take: a line before each.

    A line, and none that is redrawn: below it the step draws a bar of its own, and in a file each
    of them can be read. What is left follows the pace of the steps that this run has done.
    """

    def __init__(self, steps: Sequence[Timed], todo: Sequence[Timed], width: int = 1) -> None:
        self.number, self.of, self.width = len(steps) - len(todo), len(steps), width
        self.total = sum(step.seconds for step in steps)
        self.before_us = self.done = self.total - sum(step.seconds for step in todo)
        self.begun = time.monotonic()

    def before(self, step: Timed) -> str:
        return self._line(f"step {self.number + 1} of {self.of}: {step.name} ({self._times()})")

    def at_start(self) -> str:
        return self._line(f"{self.of - self.number} runs, {self.width} at a time: {self._times()}")

    def after(self, step: Timed, seconds: float) -> str:
        took = f"{step.name} took {_clock(seconds)}"
        return self._line(f"{self.number} of {self.of}: {took} ({self._times()})")

    def _times(self) -> str:
        """What is left, at the pace of what this run has done."""
        ours, so_far = self.done - self.before_us, time.monotonic() - self.begun
        pace = so_far / ours if ours else 1 / self.width
        left = _clock((self.total - self.done) * pace)
        return (
            f"{_clock(so_far)} so far, about {left} left"
            if ours
            else f"about {left} on {max(2, self.width)} cores"
        )

    def finish(self, step: Timed) -> None:
        self.number, self.done = self.number + 1, self.done + step.seconds

    def at_end(self) -> str:
        return self._line(f"all done in {_clock(time.monotonic() - self.begun)}")

    def _line(self, text: str) -> str:
        try:
            "█".encode(sys.stdout.encoding or "ascii")
            plain = False
        except UnicodeEncodeError:
            plain = True
        form = "== {percentage:3.0f}%|{bar:24}| " + text.replace("{", "{{").replace("}", "}}")
        return tqdm.format_meter(self.done, self.total, 0, ascii=plain, bar_format=form)


def environment(command: Sequence[str]) -> dict[str, str]:
    """This interpreter's programs first on the path; threads that do not fight over the cores."""
    cores = os.cpu_count() or 1
    ranks = int(command[2]) if command[0] == "deepspeed" else 1
    defaults = {"OMP_NUM_THREADS": str(max(1, min(4, cores // ranks)))}
    if not torch.cuda.is_available():
        defaults["DS_ACCELERATOR"] = "cpu"  # DeepSpeed finds out by itself, with many warnings
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return defaults | os.environ | {"PATH": programs}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours = f"{minutes // 60}:{minutes % 60:02d}" if minutes >= 60 else str(minutes)
    return f"{hours}:{rest:02d}"
