"""A line between two network namespaces with a rate and a delay, for kernels without netem.

Each host has a TUN device, whose packets come to this process and leave it for the other host when
a real line would have delivered them: after those before, at the rate, and the delay later. Linux.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

DEVICE = "/dev/net/tun"
MTU = 60_000  # of large packets this process moves enough
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI, _CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000


class SlowLine:
    """Both directions, until `close`."""

    def __init__(self, hosts: list[str], interface: str, rate_mbit: float, delay_ms: float) -> None:
        """Makes the devices; giving them addresses and setting them up is left to the caller."""
        self._ends = [_in_namespace(host, interface) for host in hosts]
        self._seconds_a_byte = 8 / (rate_mbit * 1e6)
        self._delay = delay_ms / 1e3
        self._closed = threading.Event()
        a, b = self._ends
        self._threads = [threading.Thread(target=self._carry, args=way) for way in ((a, b), (b, a))]
        for thread in self._threads:
            thread.start()

    def _carry(self, source: int, target: int) -> None:
        on_the_way: deque[tuple[float, bytes]] = deque()
        free_at = 0.0  # when the line has sent all that is on it
        arrivals = select.poll()
        arrivals.register(source, select.POLLIN)
        while not self._closed.is_set():
            due = on_the_way[0][0] - time.monotonic() if on_the_way else 0.1
            if arrivals.poll(max(0, 1e3 * min(due, 0.1))):
                packet = os.read(source, MTU + 100)
                free_at = max(time.monotonic(), free_at) + len(packet) * self._seconds_a_byte
                on_the_way.append((free_at + self._delay, packet))
            while on_the_way and on_the_way[0][0] <= time.monotonic():
                with suppress(OSError):  # the device is down yet: lost, as on a real line
                    os.write(target, on_the_way.popleft()[1])

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            os.close(end)


def _in_namespace(host: str, interface: str) -> int:
    """The descriptor of a new TUN device there, made by a thread that ends in that namespace."""

    def make() -> int:
        with open(f"/run/netns/{host}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {host}")
        device = os.open(DEVICE, os.O_RDWR)
        name = struct.pack("16sH22x", interface.encode(), _IFF_TUN | _IFF_NO_PI)
        fcntl.ioctl(device, _TUNSETIFF, name)
        return device

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
