"""Runs what a model has written: no network, little memory and time, an empty folder, which is all
that it can write to, and nothing of it is left.

This guards against accidents, not against an enemy: the program may read what its user may read,
and each process that it starts has the limits anew.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import comb
from pathlib import Path

from gemoe_ds.evaluation.benchmarks.code_jail import PASSED

CONFIRM = "--confirm-run-unsafe-code"
_JAIL = Path(__file__).with_name("code_jail.py")


@dataclass(frozen=True)
class Limits:
    seconds: float = 3.0  # of CPU, as the metric code_eval of the hub has it
    wall_seconds: float = 10.0
    memory: int = 1 << 30  # bytes of address space
    file: int = 1 << 20  # bytes of a file that it writes


def passes(program: str, limits: Limits = Limits()) -> bool:  # noqa: B008
    """Whether a program comes to its end without an error."""
    with tempfile.TemporaryDirectory(prefix="gemoe_code_", ignore_cleanup_errors=True) as folder:
        return _run(program, folder, limits, alone=refused() is None) == PASSED


@cache
def refused() -> str | None:
    """What of the isolation this machine does not let us have; None if there is all of it."""
    with tempfile.TemporaryDirectory(prefix="gemoe_code_") as folder:
        if _run("pass", folder, Limits(), alone=True) == PASSED:
            return None
    return (
        "the kernel gives no namespaces (user.max_user_namespaces, or the container's seccomp "
        "profile): programs could reach the network, write outside their folder and go on running"
    )


def all_pass(programs: list[str], workers: int | None = None) -> list[bool]:
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(passes, programs))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of k samples, drawn without repeats, is right: 2107.03374, eq. 1."""
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def _run(program: str, folder: str, limits: Limits, *, alone: bool) -> int:
    """Exit code; of a signal, it is negative."""
    command = [sys.executable, "-I", str(_JAIL), "alone" if alone else "", str(limits.seconds)]
    process = subprocess.Popen(
        [*command, str(limits.memory), str(limits.file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        process.communicate(program.encode(errors="replace"), timeout=limits.wall_seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):  # and whatever it has started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode
