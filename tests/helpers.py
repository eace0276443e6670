"""Run a function on several gloo ranks, and small things that several tests need."""

from __future__ import annotations

import io
import os
import random
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
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
    context = _start_method()
    queue = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(
            target=_entry, args=(function, rank, num_ranks, port, queue, args, dict(os.environ))
        )
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
            results[rank] = torch.load(io.BytesIO(value), weights_only=False)
        else:
            failures.append(f"rank {rank}:\n{value}")
    for process in processes:
        process.join(0 if failures or waited >= timeout else 10)
        if process.is_alive():
            process.kill()
    assert not failures, failures[0]
    assert len(results) == num_ranks, f"ranks {set(range(num_ranks)) - set(results)} hung"
    return [results[rank] for rank in range(num_ranks)]


def _start_method() -> Any:
    """Ranks are forked from a server that has imported all that they import: five seconds of a core
    each. CUDA does not survive a fork."""
    if torch.cuda.is_available():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["gemoe_ds.train.run"])
    return context


def _entry(
    function: Callable,
    rank: int,
    size: int,
    port: int,
    queue: Any,
    args: tuple,
    environment: dict[str, str],
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
        packed = io.BytesIO()  # whole: a tensor's shared memory would end with this process
        torch.save(function(rank, *args), packed)
        queue.put((rank, True, packed.getvalue()))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


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
