"""Two hosts of network namespaces: rate and delay between them are those given; nothing stays."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks import links

LINKS = [links.Link(200), links.Link(200, delay_ms=20), links.Link(delay_ms=20)]

SEND = """
import socket, sys, time
s = socket.create_connection((sys.argv[1], 5001))
s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
trips = []
for _ in range(5):
    start = time.monotonic()
    s.sendall(b"x")
    s.recv(1)
    trips.append(time.monotonic() - start)
start = time.monotonic()
s.sendall(bytes(int(sys.argv[2])))
s.shutdown(socket.SHUT_WR)
s.recv(1)
print(min(trips), time.monotonic() - start)
"""
TAKE = """
import socket
s = socket.create_server(("0.0.0.0", 5001))
print("ready", flush=True)
c, _ = s.accept()
for _ in range(5):
    c.send(c.recv(1))
while c.recv(1 << 20):
    pass
"""


@pytest.mark.parametrize("link", LINKS, ids=str)
def test_rate_delay_and_removal(link):
    if reason := links.why_not(link):
        pytest.skip(reason)
    size = 10_000_000
    with links.two_hosts(link) as (a, b):
        taker = subprocess.Popen([*b, sys.executable, "-c", TAKE], stdout=subprocess.PIPE)
        assert taker.stdout.readline() == b"ready\n"
        send = [*a, sys.executable, "-c", SEND, links.ADDRESSES[1], str(size)]
        sent = subprocess.run(send, check=True, capture_output=True, text=True)
        taker.wait(10)
    round_trip, seconds = map(float, sent.stdout.split())
    if link.rate_mbit:
        assert seconds > 0.8 * 8 * size / (link.rate_mbit * 1e6), "faster than the link"
    assert 2e-3 * link.delay_ms <= round_trip < 2e-3 * link.delay_ms + 0.05
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    assert f"gemoe{os.getpid()}-" not in left
