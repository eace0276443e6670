"""Errors that a user can cause, one line each: the value, the rule, the way out; exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

BUG = 1  # exit codes; this one is Python's own
MISTAKE = 2
STALLED = 3  # another rank is gone or does not move; the newest checkpoint is valid
REQUEUE = 75  # EX_TEMPFAIL: stopped on a signal, saved; the same command with resume=auto goes on


class GemoeError(Exception):
    """Base of the errors below; anything else that escapes is a bug in gemoe_ds."""


class Stopped(Exception):
    """All ranks end, because one was asked to; whatever could be saved is."""


class ConfigError(GemoeError, ValueError):
    """A recipe, an override, a DeepSpeed file or a combination of them is not valid."""


class CheckpointError(GemoeError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another run or model."""


class DataError(GemoeError, RuntimeError):
    """A data folder, a sample or an image cannot be used."""


class OutputError(GemoeError, OSError):
    """What a run leaves behind cannot be written: a full disk, or one that has gone."""


class SampleError(DataError):
    """One sample cannot be used; `needs` are the tokens of one that is too long."""

    def __init__(self, message: str, needs: int | None = None) -> None:
        super().__init__(message)
        self.needs = needs


class ImageError(SampleError):
    """An image cannot be decoded."""


@contextmanager
def writing_to(folder: object) -> Iterator[None]:
    """Turn what the disk refuses into an `OutputError` that names the run's folder."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"output_dir={folder} cannot be written to: {error.strerror or error}; its whole "
            "checkpoints stay; make room, or bring it back, and start the same command again"
        ) from error


def as_written(value: object) -> str:
    """An option's value as a recipe has it: null, true, plain text."""
    return value if isinstance(value, str) else json.dumps(value, default=repr)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn a `GemoeError` into one `error: ...` line on stderr and exit code 2; `Stopped` into 75.

    With several ranks, what all of them find is said once: the others hold back, and the launcher
    ends them when the first rank has gone. What only one rank finds is said by that rank.
    """
    try:
        yield
    except Stopped as stopped:
        if _number("RANK", *_OTHER_RANKS) == 0:
            print(f"stopped: {stopped}", file=sys.stderr, flush=True)
        _leave(REQUEUE)
    except GemoeError as error:
        message = " ".join(str(error).split())
        rank = _number("RANK", *_OTHER_RANKS)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # there is nothing to save any more
        if rank:
            time.sleep(_patience(time.monotonic() - _BEGAN))
            message = f"(rank {rank}) {message}"
        if _number("WORLD_SIZE") > 1:
            # One write that begins with a newline: another rank's bar may stand in this line.
            sys.stderr.write(f"\nerror: {message}\n")
            _leave(MISTAKE)
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(MISTAKE)


def in_a_line(error: BaseException, limit: int | None = None) -> str:
    """`ValueError: what it says`, of code that is not ours; at most `limit` characters of it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:limit]}"


def _number(*names: str) -> int:
    """The first of these variables that holds one; they may be what is wrong."""
    found = (os.environ.get(name, "") for name in names)
    return next((int(text) for text in found if re.fullmatch("[0-9]{1,18}", text)), 0)


def _patience(age: float) -> float:
    """How long a rank holds back in its `age`th second: as slow as its own start was, the first
    rank's may be too, on a machine with much to do. Later on all find it at the same time."""
    return max(_FIRST_RANK_SPEAKS_FIRST, 3 * age if age < _A_START else 0.0)


def _leave(code: int) -> NoReturn:
    """At once: with other ranks gone, what Python does at its end may wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_BEGAN = time.monotonic()
_FIRST_RANK_SPEAKS_FIRST = 9.0  # seconds
_A_START = 60.0  # seconds, at most
_OTHER_RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # before RANK is set by them
