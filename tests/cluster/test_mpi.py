"""mpirun: ranks find each other through MPI, and train what torchrun trains."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest

from tests.cluster.launches import metrics, ranks, write_recipe
from tests.helpers import repository
from tests.train.resuming import write_setting

missing = shutil.which("mpirun") is None or importlib.util.find_spec("mpi4py") is None
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(missing, reason="no mpirun or no mpi4py: make cluster-tools"),
]


def test_two_ranks(tmp_path):
    setting = write_setting(tmp_path / "setting")
    recipe, output = write_recipe(setting, tmp_path / "mpi")
    command = ["mpirun", "-np", "2", "--oversubscribe", "--allow-run-as-root"]
    done = subprocess.run(
        [*command, sys.executable, "launch/train.py", str(recipe)],
        cwd=repository(),
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    recipe, other = write_recipe(setting, tmp_path / "env")
    with ranks(tmp_path / "logs", recipe, 2) as running:
        assert running.codes() == [0, 0]
    losses = [[line["loss/lm"] for line in metrics(run)] for run in (output, other)]
    assert losses[0] == losses[1]
