"""Run a function on several gloo ranks, and small things that several tests need."""

from __future__ import annotations

import io
import os
import random
import runpy
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, timeout: float = 120
) -> list:
    """`function(rank, *args)` on `num_ranks` new processes of one group; results by rank.

    A rank that raises fails the test with its traceback, one that dies with its exit code; ranks
    that hang are killed after `timeout` seconds. `function` must be importable (defined at module
    level).
    """
    context = start_method()
    job = _packed((function, args))
    port = free_port()
    ranks = []
    for rank in range(num_ranks):
        pipe, end = context.Pipe(duplex=False)
        arguments = (rank, num_ranks, port, end, job, dict(os.environ))
        ranks.append((context.Process(target=_entry, args=arguments), pipe))
        ranks[rank][0].start()
        end.close()  # the rank alone has it: when it dies, the pipe ends
    patience = 0  # with what goes on after a failure
    try:
        results = _results(ranks, time.monotonic() + timeout)
        patience = 10
    finally:
        for process, pipe in ranks:
            process.join(patience)
            process.kill()
            process.join()
            pipe.close()
    return results


def _results(ranks: list[tuple[Any, Any]], deadline: float) -> list:
    """What each of (process, pipe) returned, however late after the others."""
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(ranks) if rank not in results}
        ready = wait(list(waiting), deadline - time.monotonic())
        assert ready, f"ranks {sorted(waiting.values())} hung"
        for pipe in ready:
            rank = waiting[pipe]
            try:
                ok, value = pipe.recv()
            except EOFError:
                process = ranks[rank][0]
                process.join(10)
                raise AssertionError(f"rank {rank} died: exit code {process.exitcode}") from None
            assert ok, f"rank {rank}:\n{value}"
            results[rank] = _unpacked(value)
    return [results[rank] for rank in range(len(ranks))]


class Forked:
    """`python words` in the repository, as far as it is like a `subprocess.Popen`; started like a
    rank. Not for what happens when an interpreter ends: this one ends without ado."""

    def __init__(self, words: list[str], out: Path, err: Path, environment: dict[str, str]) -> None:
        self._process = start_method().Process(
            target=_script, args=(words, [str(out), str(err)], environment)
        )
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutExpired(self._process.name, timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def run_python(
    script: str, *arguments: object, timeout: float = 200, env: Mapping[str, str] | None = None
) -> CompletedProcess[str]:
    """`python script arguments` to its end, with `env` beside the environment."""
    words = [script, *map(str, arguments)]
    with TemporaryDirectory() as folder:
        written = Path(folder) / "stdout", Path(folder) / "stderr"
        process = Forked(words, *written, {**os.environ, **(env or {})})
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return CompletedProcess(words, code, *(path.read_text() for path in written))


def run_here(main: Callable[[list[str]], None], *arguments: object) -> CompletedProcess[str]:
    """`main(arguments)` in this process: what it said, and its exit code."""
    words, code = [*map(str, arguments)], 0
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            main(words)
        except SystemExit as stop:
            code = stop.code
    return CompletedProcess(words, code, out.getvalue(), err.getvalue())


def _script(words: list[str], written: list[str], environment: dict[str, str]) -> None:
    end_with_tests()
    for descriptor, path in zip((1, 2), written, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(repository())
    sys.argv = words
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def start_method() -> Any:
    """Processes are forked from a server that has imported all that they import (tests/warm.py),
    which takes six seconds of a core. CUDA does not survive a fork."""
    if torch.cuda.is_available():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    return context


def end_with_tests() -> None:
    """This process ends when the tests' does, however that one ends."""

    def watch() -> None:
        mp.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _entry(
    rank: int, size: int, port: int, pipe: Any, job: bytes, environment: dict[str, str]
) -> None:
    end_with_tests()
    os.environ.clear()
    os.environ.update(environment)  # the server has that of its own start
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        function, args = _unpacked(job)
        pipe.send((True, _packed(function(rank, *args))))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _packed(value: Any) -> bytes:
    """Whole: a tensor's shared memory would end with its process."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _unpacked(value: bytes) -> Any:
    return torch.load(io.BytesIO(value), weights_only=False)


def free_port() -> int:
    """A port that nobody has, and that no connection is given before it is used: those come from
    the range above 32768."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def gloo() -> None:
    """Join the group that `run_ranks` described."""
    dist.init_process_group("gloo")


def repository() -> Path:
    return Path(__file__).resolve().parent.parent
