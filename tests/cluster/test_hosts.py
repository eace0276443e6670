"""Two hosts with names and addresses of their own: torchrun on each, deepspeed over pdsh."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gemoe_ds.cluster.job import Job
from tests.cluster.hosts import hosts, why_not
from tests.cluster.launches import metrics, ranks, write_recipe
from tests.helpers import repository
from tests.train.resuming import write_setting

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
    pytest.mark.timeout(400),
]
CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
PROGRAMS = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    with hosts(tmp_path_factory.mktemp("network")) as up:
        yield up


@pytest.fixture(scope="module")
def alone(setting):
    """The losses of two ranks of one host."""
    recipe, output = write_recipe(setting, setting["root"] / "alone")
    with ranks(output.parent, recipe, 2) as running:
        assert running.codes() == [0, 0], running.log(0)
    return [line["loss/lm"] for line in metrics(output)]


def job(recipe: Path, two) -> Job:
    return Job(str(recipe), (), 2, 1, tuple(two.names))


def test_torchrun_on_each(setting, two, alone, tmp_path):
    recipe, output = write_recipe(setting, tmp_path)
    started = [
        subprocess.Popen(
            two.command(name, *job(recipe, two).command("torchrun", node)),
            cwd=repository(),
            env=os.environ | CPU | {"PATH": PROGRAMS},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node, name in enumerate(two.names)
    ]
    said = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "preflight: 2 ranks on 2 hosts are fit" in said[0]
    assert "slow: parallel.ep_size=2 exceeds the 1 ranks of a host" in said[0]
    assert [line["loss/lm"] for line in metrics(output)] == alone


def test_deepspeed_over_pdsh(setting, two, alone, tmp_path):
    recipe, output = write_recipe(setting, tmp_path)
    (tmp_path / "hostfile").write_text(job(recipe, two).hostfile())
    # what ssh does not carry over: deepspeed sends the variables of this file along
    lines = [f"{key}={value}" for key, value in CPU.items()]
    (tmp_path / ".deepspeed_env").write_text("\n".join(lines) + "\n")
    command = job(recipe, two).command("deepspeed")
    command[command.index("hostfile")] = str(tmp_path / "hostfile")
    command[command.index("launch/train.py")] = str(repository() / "launch/train.py")
    with_cwd = ["bash", "-c", f"cd {tmp_path} && {shlex.join(command)}"]
    config = recipe.read_text()
    assert "ds_configs" in config
    done = two.run(two.names[0], *with_cwd, env=os.environ | CPU | {"PATH": PROGRAMS})
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "preflight: 2 ranks on 2 hosts are fit" in done.stdout
    assert [line["loss/lm"] for line in metrics(output)] == alone
