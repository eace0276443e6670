"""Two hosts on one machine, joined by a link of a given rate: what a slow network does to a layer.

The hosts are network namespaces of Linux with a veth pair between them; tbf limits what each sends.
Both share the cores and the memory of the machine, so only the network is slow. Needs root and
iproute2. Delay is not emulated: few kernels have netem, and tbf limits rates only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

ADDRESSES = ("10.79.0.1", "10.79.0.2")
INTERFACE = "eth0"


def why_not() -> str | None:
    """What is missing on this machine; None if the links can be made."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"needs {' and '.join(missing)} (Debian: apt install iproute2)"
    return None


@contextmanager
def two_hosts(rate_mbit: float | None) -> Iterator[list[list[str]]]:
    """The command prefixes of the two hosts; `rate_mbit` None: as fast as the machine can."""
    names = [f"gemoe{os.getpid()}-{index}" for index in range(2)]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        ends = [f"gm{os.getpid()}{side}" for side in "ab"]
        _run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            _run("ip", "link", "set", end, "netns", name)
            _run("ip", "-n", name, "link", "set", end, "name", INTERFACE)
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            _run("ip", "-n", name, "link", "set", INTERFACE, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            if rate_mbit is not None:
                limit = ("rate", f"{rate_mbit}mbit", "burst", "256kb", "latency", "200ms")
                inside = ("ip", "netns", "exec", name)
                _run(*inside, "tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", *limit)
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:  # takes its end of the pair along
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
