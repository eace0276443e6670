"""Two hosts on one machine, joined by a link of a given rate and delay: a slow network's effect.

The hosts are network namespaces of Linux with a veth pair between them; tbf limits what each sends.
With a delay a `SlowLine` takes the pair's place, for few kernels have netem. Both hosts share the
cores and the memory of the machine, so only the network is slow. Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from benchmarks.slow_line import DEVICE, MTU, SlowLine

ADDRESSES = ("10.79.0.1", "10.79.0.2")
INTERFACE = "eth0"


@dataclass(frozen=True)
class Link:
    """What each host sends at most, and how much later it arrives."""

    rate_mbit: float | None = None  # None: as fast as the machine can
    delay_ms: float = 0.0

    def __str__(self) -> str:
        rate = "no limit" if self.rate_mbit is None else f"{self.rate_mbit:g} Mbit/s"
        return rate + (f", {self.delay_ms:g} ms" if self.delay_ms else "")


def why_not(link: Link = Link()) -> str | None:
    """What is missing on this machine; None if the link can be made."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"needs {' and '.join(missing)} (Debian: apt install iproute2)"
    if link.delay_ms and not os.access(DEVICE, os.R_OK | os.W_OK):
        return f"needs {DEVICE}"
    return None


@contextmanager
def two_hosts(link: Link) -> Iterator[list[list[str]]]:
    """The command prefixes of the two hosts."""
    names = [f"gemoe{os.getpid()}-{index}" for index in range(2)]
    with ExitStack() as undo:
        for name in names:
            _run("ip", "netns", "add", name)  # which takes its end of a pair along
            undo.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True)
        if link.delay_ms:
            rate = link.rate_mbit or 100_000
            undo.callback(SlowLine(names, INTERFACE, rate, link.delay_ms).close)
        else:
            _make_pair(names)
        for name, address in zip(names, ADDRESSES, strict=True):
            inside = ("ip", "netns", "exec", name)
            if link.delay_ms:
                _run("ip", "-n", name, "link", "set", INTERFACE, "mtu", str(MTU))
            elif link.rate_mbit is not None:
                limit = ("rate", f"{link.rate_mbit}mbit", "burst", "256kb", "latency", "200ms")
                _run(*inside, "tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", *limit)
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            _run("ip", "-n", name, "link", "set", INTERFACE, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
        yield [["ip", "netns", "exec", name] for name in names]


def _make_pair(names: list[str]) -> None:
    ends = [f"gm{os.getpid()}{side}" for side in "ab"]
    _run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    for name, end in zip(names, ends, strict=True):
        _run("ip", "link", "set", end, "netns", name)
        _run("ip", "-n", name, "link", "set", end, "name", INTERFACE)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
