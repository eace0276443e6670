"""torchrun starts all ranks again when one is lost, and the run goes on as if none had been."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cluster.launches import harmed, metrics, ranks, write_recipe
from tests.helpers import repository
from tests.train.resuming import write_setting
from tests.train.sample_logs import read_sample_log


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_restarted(tmp_path, victim):
    setting = write_setting(tmp_path / "setting")
    recipe, output = write_recipe(setting, tmp_path / "whole")
    with ranks(tmp_path / "logs", recipe, 2) as running:
        assert running.codes() == [0, 0], running.log(0)
    every = {"checkpoint": {"every": 4, "keep": 2}, "monitor__stall_seconds": 5.0}
    recipe, cut = write_recipe(setting, tmp_path / "cut", **every)
    marker = str(tmp_path / "was-killed")
    once = f"number == 11 and not os.path.exists({marker!r})"
    kill = f'open({marker!r}, "w").close(); os.kill(os.getpid(), 9)'
    script = harmed(tmp_path / "killed.py", kill, when=once, victim=victim)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=2"]
    done = subprocess.run(
        [*command, "--nproc-per-node=2", str(script), str(recipe)],
        cwd=repository(),
        env=os.environ | {"DS_ACCELERATOR": "cpu", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert os.path.exists(marker) and "step-000008" in done.stdout, done.stdout[-3000:]
    first, second = ({x["step"]: x["loss/lm"] for x in metrics(o)} for o in (output, cut))
    assert first == second and read_sample_log(output) == read_sample_log(cut)
