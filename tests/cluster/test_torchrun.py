"""torchrun starts all ranks again when one is lost, and the run goes on as if none had been."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gemoe_ds.train.ledger import read_ledger
from tests.cluster.launches import metrics, ranks
from tests.cluster.test_stopping import write_recipe
from tests.helpers import repository
from tests.train.resuming import write_setting

KILLED_ONCE = """
import os, sys
sys.path.insert(0, os.getcwd())
import gemoe_ds.train.trainer as trainer
step = trainer.Trainer.train_step
def harmed(self, number, batches, *, collect):
    if number == 11 and self.world.rank == {victim} and not os.path.exists({marker!r}):
        open({marker!r}, "w").close()
        os.kill(os.getpid(), 9)
    return step(self, number, batches, collect=collect)
trainer.Trainer.train_step = harmed
from launch.train import main
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_restarted(tmp_path, victim, record_property):
    setting = write_setting(tmp_path / "setting")
    recipe, output = write_recipe(setting, tmp_path / "whole")
    with ranks(tmp_path / "logs", recipe, 2) as running:
        assert running.codes() == [0, 0], running.log(0)
    every = {"checkpoint": {"every": 4, "keep": 2}, "monitor__stall_seconds": 5.0}
    recipe, cut = write_recipe(setting, tmp_path / "cut", **every)
    marker, script = str(tmp_path / "was-killed"), tmp_path / "killed.py"
    script.write_text(KILLED_ONCE.format(victim=victim, marker=marker))
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
    assert first == second and read_ledger(output) == read_ledger(cut)
