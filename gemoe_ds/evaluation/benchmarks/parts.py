"""What each rank leaves behind as it answers, from which the same command goes on.

    OUT/MODE/parts/000/start.json                how many ranks this start had
    OUT/MODE/parts/000/rank_R.TASK.jsonl         answers, as they come
    OUT/MODE/parts/000/rank_R.TASK.ROUND.npz     how their tokens were routed
    OUT/MODE/parts/000/rank_R.ROUND.json         `Commit`: what of them counts, whenever it ends

A commit replaces the one before it, which stays until the next: ranks that share experts go on from
the newest round that all of them have.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gemoe_ds.analysis.routing_sums import RoutingSums
from gemoe_ds.errors import OutputError
from gemoe_ds.evaluation.benchmarks.requests import Answer
from gemoe_ds.evaluation.routing import RoutingCounter
from gemoe_ds.files import fsync_path, write_text

PARTS, START, ANSWERS, ROUTING = "parts", "start.json", "answers.jsonl", "routing.npz"
_WORTH = 20  # times what the last commit took: how long the work before the next one takes


@dataclass
class TaskPart:
    """Of one task on one rank."""

    done: list[tuple[int, int]] = field(default_factory=list)  # places in the plan, from and to
    num_bytes: int = 0  # of the answers that count
    routing: str = ""  # file name


@dataclass
class _Open:
    part: TaskPart
    counter: RoutingCounter
    file: BinaryIO
    is_dirty: bool = True


class PartWriter:
    """Of this rank, in this start. Rounds count from 1."""

    def __init__(self, folder: Path, rank: int, new_counter: Callable[[], RoutingCounter]) -> None:
        self.folder, self.rank, self._new_counter = folder, rank, new_counter
        self._open: dict[str, _Open] = {}
        self._closed: dict[str, TaskPart] = {}
        self._current = ""
        self._commits: list[int] = []
        self._took, self._at = 0.0, time.perf_counter()

    def counter(self, task: str) -> RoutingCounter:
        return self._of(task).counter

    def add(
        self, task: str, first: int, last: int, answers: Sequence[Answer], counter: RoutingCounter
    ) -> None:
        """All answers to these places of the task's plan. Tasks come one after the other."""
        self._current, state = task, self._of(task)
        lines = "".join(f"{answer.as_json()}\n" for answer in answers).encode()
        state.file.write(lines)
        part, state.counter, state.is_dirty = state.part, counter, True
        part.num_bytes += len(lines)
        if part.done and part.done[-1][1] == first:
            part.done[-1] = (part.done[-1][0], last)
        else:
            part.done.append((first, last))

    @property
    def is_due(self) -> bool:
        """Whether as much has been done as makes a commit worth its time."""
        return time.perf_counter() - self._at >= _WORTH * self._took

    def commit(self, number: int) -> None:
        """What was added so far, up to this round, counts."""
        began = time.perf_counter()
        with writing_answers(self.folder):
            self._commit(number)
        self._at = time.perf_counter()
        self._took = self._at - began

    def _commit(self, number: int) -> None:
        for task, state in self._open.items():
            if state.is_dirty:
                state.file.flush()
                os.fsync(state.file.fileno())
                state.part.routing = f"rank_{self.rank}.{task}.{number}.npz"
                state.counter.sums.save(self.folder / state.part.routing)
                fsync_path(self.folder / state.part.routing)
                state.is_dirty = False
        for task in [task for task in self._open if task != self._current]:
            state = self._open.pop(task)
            state.file.close()
            self._closed[task] = state.part
        parts = self._closed | {task: state.part for task, state in self._open.items()}
        content = {task: asdict(part) for task, part in parts.items()}
        write_text(self.folder / f"rank_{self.rank}.{number}.json", json.dumps(content))
        if number not in self._commits:
            self._commits.append(number)
        self._forget_old()

    def close(self) -> None:
        for state in self._open.values():
            state.file.close()

    def _of(self, task: str) -> _Open:
        if task not in self._open:
            path = self.folder / f"rank_{self.rank}.{task}.jsonl"
            self._open[task] = _Open(TaskPart(), self._new_counter(), path.open("wb"))
        return self._open[task]

    def _forget_old(self) -> None:
        """All but the last two commits, and the routing that only they name."""
        for number in self._commits[:-2]:
            (self.folder / f"rank_{self.rank}.{number}.json").unlink()
        self._commits = self._commits[-2:]
        named = {
            part.routing
            for number in self._commits
            for part in _read_commit(self.folder / f"rank_{self.rank}.{number}.json").values()
        }
        for path in self.folder.glob(f"rank_{self.rank}.*.npz"):
            if path.name not in named:
                path.unlink()


@contextmanager
def writing_answers(folder: Path) -> Iterator[None]:
    """What the disk refuses is one line, with the way out."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written to: {error.strerror or error}; what is answered stays; "
            "make room, or bring it back, and start the same command again"
        ) from error


def _read_commit(path: Path) -> dict[str, TaskPart]:
    return {task: TaskPart(**part) for task, part in json.loads(path.read_bytes()).items()}


@dataclass(frozen=True)
class FoundPart:
    """Of one task on one rank of one start."""

    folder: Path
    rank: int
    part: TaskPart

    def answers(self, task: str) -> Path:
        return self.folder / f"rank_{self.rank}.{task}.jsonl"


def new_start(mode: Path, num_ranks: int, batch: int, *, together: bool) -> Path:
    """The folder of this start's parts; `together`: ranks share experts. By the first rank."""
    numbers = [int(path.name) for path in (mode / PARTS).glob("[0-9]*")]
    folder = mode / PARTS / f"{max(numbers, default=-1) + 1:03}"
    folder.mkdir(parents=True)
    start = {"ranks": num_ranks, "together": together, "batch": batch}
    write_text(folder / START, json.dumps(start))
    return folder


def batch_of(mode: Path) -> int | None:
    """Tokens of a batch in the first start, if there was one."""
    with suppress(OSError, ValueError):
        batch: int = json.loads((mode / PARTS / "000" / START).read_bytes())["batch"]
        return batch
    return None


def found_parts(mode: Path) -> dict[str, list[FoundPart]]:
    """What earlier starts have left behind that counts, by task."""
    found: dict[str, list[FoundPart]] = {}
    for folder in sorted((mode / PARTS).glob("[0-9]*")):
        for rank, number in _newest(folder):
            commit = _read_commit(folder / f"rank_{rank}.{number}.json")
            for task, part in commit.items():
                found.setdefault(task, []).append(FoundPart(folder, rank, part))
    return found


def _newest(folder: Path) -> Iterator[tuple[int, int]]:
    """Rank and round of the commits of a start that count."""
    with suppress(FileNotFoundError):
        start = json.loads((folder / START).read_bytes())
        commits: list[set[int]] = [set() for _ in range(start["ranks"])]
        for path in folder.glob("rank_*.json"):
            rank, number = path.stem.removeprefix("rank_").split(".")
            commits[int(rank)].add(int(number))
        if start["together"]:
            commits = [set.intersection(*commits)] * len(commits)
        yield from ((of, max(numbers)) for of, numbers in enumerate(commits) if numbers)


def merge_task(
    out: Path, task: str, parts: Sequence[FoundPart], empty: RoutingSums
) -> tuple[int, int]:
    """answers.jsonl, sorted by key, and routing.npz of a task; gives the number of answers, and of
    those whose prompt was cut."""
    found = [part for part in parts if part.part.done]
    sums = (RoutingSums.load(part.folder / part.part.routing) for part in found)
    RoutingSums.total(chain([empty], sums)).save(out / ROUTING)  # one in memory after the other
    files = [part.answers(task).open("rb") for part in found]
    try:
        keys, places, cut = _index(files, [part.part.num_bytes for part in found])
        order = np.argsort(keys, kind="stable")
        partial = out / f".{ANSWERS}.tmp"
        with partial.open("wb") as merged:
            for at in order:
                number, start = places[at]
                files[number].seek(int(start))
                merged.write(files[number].readline())
        fsync_path(partial)
        os.replace(partial, out / ANSWERS)
    finally:
        for file in files:
            file.close()
    return len(keys), cut


def _index(files: Sequence[BinaryIO], sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray, int]:
    """Key, and file and place in it, of every answer, 48 bytes for each; how many were cut."""
    keys, places, cut = bytearray(), array("q"), 0
    for number, (file, size) in enumerate(zip(files, sizes, strict=True)):
        while (start := file.tell()) < size:
            answer = json.loads(file.readline())
            keys += answer["key"].encode()
            cut += answer["cut_tokens"] > 0
            places.extend((number, start))
    return np.frombuffer(keys, "S32"), np.array(places, np.int64).reshape(-1, 2), cut


def remove_parts(mode: Path) -> None:
    """Unless they hold answers to a task that is not asked this time."""
    if all((mode / task / ANSWERS).exists() for task in found_parts(mode)):
        shutil.rmtree(mode / PARTS, ignore_errors=True)
