"""Run a function on several gloo ranks, and small things that several tests need."""

from __future__ import annotations

import io
import os
import random
import runpy
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
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

    A rank that raises fails the test with its traceback; ranks that hang are killed after
    `timeout` seconds. `function` must be importable (defined at module level).
    """
    context = start_method()
    queue = context.SimpleQueue()
    port = free_port()
    job = _packed((function, args))
    processes = [
        context.Process(target=_entry, args=(rank, num_ranks, port, queue, job, dict(os.environ)))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    failures = []
    waited = 0.0
    while len(results) + len(failures) < num_ranks and waited < timeout and not failures:
        if queue.empty():
            processes[0].join(0.02)
            waited += 0.02
            continue
        rank, ok, value = queue.get()
        if ok:
            results[rank] = _unpacked(value)
        else:
            failures.append(f"rank {rank}:\n{value}")
    for process in processes:
        process.join(0 if failures or waited >= timeout else 10)
        if process.is_alive():
            process.kill()
    assert not failures, failures[0]
    assert len(results) == num_ranks, f"ranks {set(range(num_ranks)) - set(results)} hung"
    return [results[rank] for rank in range(num_ranks)]


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


def run_python(script: str, *arguments: object, timeout: float = 200) -> CompletedProcess[str]:
    """`python script arguments` to its end."""
    words = [script, *map(str, arguments)]
    with TemporaryDirectory() as folder:
        written = Path(folder) / "stdout", Path(folder) / "stderr"
        process = Forked(words, *written, dict(os.environ))
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return CompletedProcess(words, code, *(path.read_text() for path in written))


def _script(words: list[str], written: list[str], environment: dict[str, str]) -> None:
    for descriptor, path in zip((1, 2), written, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(repository())
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def start_method() -> Any:
    """Processes are forked from a server that has imported all that they import, which takes five
    seconds of a core. CUDA does not survive a fork."""
    if torch.cuda.is_available():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["gemoe_ds.train.run"])
    return context


def _entry(
    rank: int, size: int, port: int, queue: Any, job: bytes, environment: dict[str, str]
) -> None:
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
        queue.put((rank, True, _packed(function(rank, *args))))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
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
