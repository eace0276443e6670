"""Ranks of a test: waited for, their ends told, started from a server that is warm."""

import os
import signal
import sys
import time

import psutil
import pytest

from tests.helpers import run_ranks


def late(rank: int, seconds: float) -> int:
    time.sleep(rank * seconds)
    return rank


def test_a_rank_that_ends_after_the_others_is_waited_for():
    assert run_ranks(late, 3, 0.3) == [0, 1, 2]


def hanging(rank: int) -> None:
    if rank == 1:
        time.sleep(60)


def failing(rank: int) -> None:
    if rank == 0:
        raise ValueError("of rank 0")
    time.sleep(60)


def dying(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@pytest.mark.parametrize(
    "function, told",
    [
        (hanging, r"ranks \[1\] hung"),
        (failing, r"(?s)rank 0:.*ValueError: of rank 0"),
        (dying, "rank 1 died: exit code -9"),
    ],
)
def test_a_rank_that_does_not_return_fails_the_test_and_none_stays(function, told):
    before, began = _processes(), time.monotonic()
    with pytest.raises(AssertionError, match=told):
        run_ranks(function, 2, timeout=3 if function is hanging else 30)
    assert time.monotonic() - began < 15
    assert len(_processes() - before) <= 1  # the fork server, if this test was the first to ask


def _processes() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def modules(rank: int) -> set[str]:
    return set(sys.modules)


def test_ranks_have_imported_what_they_would():
    (known,) = run_ranks(modules, 1)
    assert {"tests.warm", "torch._dynamo", "grain", "deepspeed.runtime.zero.stage3"} <= known
