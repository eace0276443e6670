"""Ranks of several hosts watch each other through one connection a host."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from gemoe_ds.errors import BUG, STALLED
from tests.helpers import Forked, free_port

BOUND = 3.0
# Hosts as the ranks know them. A rank fails when it is asked to.
SCRIPT = """
import os, sys, time
from gemoe_ds.cluster.watchdog import watched
from gemoe_ds.engine import host_memory
from gemoe_ds.engine.world import distributed, gather_objects
from gemoe_ds.progress import COMPUTE, PROGRESS

rank, folder, bound = int(os.environ["RANK"]), sys.argv[1], float(sys.argv[2])
host_memory._this_host = lambda: f"host {rank // int(sys.argv[3])}"

def sockets():
    links = [f"/proc/self/fd/{file}" for file in os.listdir("/proc/self/fd")]
    return sum(os.path.islink(link) and "socket" in os.readlink(link) for link in links)

with distributed() as world:
    before = sockets()
    with watched(world, bound):
        PROGRESS.enter(COMPUTE, 7)
        gather_objects(None)
        with open(f"{folder}/{rank}", "w") as file:
            file.write(str(sockets() - before))
        began = time.monotonic()
        while time.monotonic() - began < 60 and not os.path.exists(f"{folder}/over"):
            time.sleep(0.1)
            PROGRESS.num_events += 1
            if os.path.exists(f"{folder}/fail {rank}"):
                raise ValueError("boom")
"""


class Ranks:
    def __init__(self, folder: Path, number: int, on_a_host: int = 2) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        script = folder / "ranks.py"
        script.write_text(SCRIPT)
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = []
        for rank in range(number):
            of = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
            out = folder / f"log {rank}"
            words = [str(script), str(folder), str(BOUND), str(on_a_host)]
            self.processes.append(Forked(words, out, out, os.environ | where | of))
        end = time.monotonic() + 60
        while not all((folder / str(rank)).exists() for rank in range(number)):
            assert time.monotonic() < end, [self.said(rank) for rank in range(number)]
            time.sleep(0.1)
        time.sleep(BOUND / 5)  # until what was said is known everywhere

    def said(self, rank: int) -> str:
        return (self.folder / f"log {rank}").read_text()

    def signal(self, rank: int, number: int) -> None:
        self.processes[rank].send_signal(number)


@pytest.fixture
def ranks(tmp_path):
    started = Ranks(tmp_path, 4)
    yield started
    for process in started.processes:
        process.kill()


@pytest.mark.parametrize(
    "victim, number, words",
    [
        (3, signal.SIGSTOP, "has been silent for"),
        (2, signal.SIGSTOP, "has been silent for"),  # the first of its host
        (0, signal.SIGSTOP, "has been silent for"),  # the first of all
        pytest.param(1, signal.SIGSTOP, "has been silent for", marks=pytest.mark.slow),
        (2, signal.SIGKILL, "(is gone|has been silent for)"),
        pytest.param(0, signal.SIGKILL, "is gone", marks=pytest.mark.slow),
    ],
)
def test_whoever_is_gone_is_named_by_all_others(ranks, victim, number, words):
    ranks.signal(victim, number)
    began = time.monotonic()
    for other in {0, 1, 2, 3} - {victim}:
        assert ranks.processes[other].wait(3 * BOUND + 10) == STALLED, ranks.said(other)
        assert f"error: rank {victim} (host " in ranks.said(other)
        assert re.search(words, ranks.said(other))
        assert "it was last seen at: step 7, forward and backward" in ranks.said(other)
    assert time.monotonic() - began < 2 * BOUND + 10


@pytest.mark.parametrize("victim", [2, 3])
def test_a_failure_is_told_on_all_hosts(ranks, victim):
    (ranks.folder / f"fail {victim}").touch()
    for rank in range(4):
        assert ranks.processes[rank].wait(30) == BUG if rank != victim else True
        if rank != victim:
            assert f"error: rank {victim} (host " in ranks.said(rank)
            assert "failed: ValueError: boom" in ranks.said(rank)
    assert "Traceback" in ranks.said(victim)


def connections(folder: Path, on_a_host: int) -> list[int]:
    """Sockets that the watch adds to each of four ranks."""
    ranks = Ranks(folder, 4, on_a_host)
    (folder / "over").touch()
    assert [process.wait(30) for process in ranks.processes] == [0] * 4
    return [int((folder / str(rank)).read_text()) for rank in range(4)]


def test_a_host_has_one_connection(tmp_path):
    one_host = connections(tmp_path / "one", 4)
    two_hosts = connections(tmp_path / "two", 2)
    assert one_host[1:] == [0, 0, 0] and two_hosts[1:] == [0, 1, 0]
    assert two_hosts[0] == one_host[0] + 1
