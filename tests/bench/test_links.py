"""Two hosts of network namespaces: they see each other at the given rate, and nothing stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from gemoe_ds.bench import links

pytestmark = pytest.mark.skipif(links.why_not() is not None, reason=str(links.why_not()))

SEND = """
import socket, sys
s = socket.create_connection((sys.argv[1], 5001))
s.sendall(bytes(int(sys.argv[2])))
s.shutdown(socket.SHUT_WR)
s.recv(1)
"""
TAKE = """
import socket
s = socket.create_server(("0.0.0.0", 5001))
print("ready", flush=True)
c, _ = s.accept()
while c.recv(1 << 20):
    pass
"""


def test_rate_and_removal():
    with links.two_hosts(200) as (a, b):
        taker = subprocess.Popen([*b, sys.executable, "-c", TAKE], stdout=subprocess.PIPE)
        assert taker.stdout.readline() == b"ready\n"
        start = time.monotonic()
        size = 10_000_000
        subprocess.run([*a, sys.executable, "-c", SEND, links.ADDRESSES[1], str(size)], check=True)
        seconds = time.monotonic() - start
        taker.wait(10)
    assert seconds > 0.8 * 8 * size / 200e6, "faster than the link"
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    assert f"gemoe{os.getpid()}-" not in left
