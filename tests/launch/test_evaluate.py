"""launch/evaluate.py as a process: what a run trained, and how often bfloat16 moves k."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers import repository, run_ranks
from tests.train.resuming import make_config, train_all, write_setting


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("evaluate"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_flips_against_float32_are_counted(setting, tmp_path, dtype):
    run = tmp_path / "run"
    config = make_config(setting, run, model__dtype=dtype, parallel__ep_size=1)
    assert run_ranks(train_all, 1, [config]) == [None]
    command = [sys.executable, repository() / "launch/evaluate.py", run / "config.yaml"]
    command += ["--trained", run, "--data", setting["data"], "--out", tmp_path / "out", "--flips"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "out/eval.json").read_text())["method"] == "gemoe"
    flips = json.loads((tmp_path / "out/k_flips.json").read_text())
    assert flips["dtype"] == dtype and flips["tokens"] > 100
    shares = flips["flipped_per_layer"]
    assert len(shares) == 2 and max(shares) < 0.2
    assert dtype == "bfloat16" or shares == [0.0, 0.0]


def test_flips_of_a_static_k_are_refused(setting, tmp_path):
    command = [sys.executable, repository() / "launch/evaluate.py", "unused.yaml", "--k", "2"]
    command += ["--data", setting["data"], "--out", tmp_path / "out", "--flips"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "a static k never flips" in done.stderr
