"""launch/doctor.py, and ranks that cannot meet: one line, no traceback, nothing written."""

from __future__ import annotations

import socket
import time

import pytest

from tests.cluster.launches import ranks, write_recipe
from tests.helpers import free_port, run_python
from tests.train.resuming import write_setting

DOCTOR = "launch/doctor.py"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("doctor"))


def test_fit_ranks(setting, tmp_path):
    recipe, output = write_recipe(setting, tmp_path)
    with ranks(tmp_path / "logs", recipe, 2, script=DOCTOR) as running:
        assert running.codes() == [0, 0], running.log(0)
        assert "preflight: 2 ranks on 1 hosts are fit" in running.log(0)
    assert not output.exists()


def alone(recipe, **environment: str) -> list[str]:
    """The error lines of rank 0 of a world that the environment describes."""
    base = {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    done = run_python(DOCTOR, recipe, timeout=100, env=base | environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_a_missing_node(setting, tmp_path):
    recipe, _ = write_recipe(setting, tmp_path)
    port = str(free_port())
    began = time.monotonic()
    (line,) = alone(recipe, WORLD_SIZE="2", MASTER_PORT=port, GEMOE_RENDEZVOUS_SECONDS="3")
    assert f"waited 3 s for 2 ranks to meet at 127.0.0.1:{port}" in line
    assert time.monotonic() - began < 40


def test_a_port_that_is_taken(setting, tmp_path):
    recipe, _ = write_recipe(setting, tmp_path)
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1])
        (line,) = alone(recipe, WORLD_SIZE="2", MASTER_PORT=port)
    assert f"port {port} of host " in line and "is taken" in line


def test_an_interface_that_is_not_there(setting, tmp_path):
    recipe, _ = write_recipe(setting, tmp_path, parallel__ep_size=1)
    port = str(free_port())
    (line,) = alone(recipe, WORLD_SIZE="1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="nope0")
    assert "GLOO_SOCKET_IFNAME=nope0" in line and "interfaces of host" in line and "lo" in line
