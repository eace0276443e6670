"""The mean k: counted in several processes, read in another one."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

CODE = """
import sys
from pathlib import Path
import torch
from gemoe_vllm.counts import Counts, folder

counts = Counts(folder(), 2, torch.device("cpu"))
mask_TE = torch.tensor([[True, True, False], [True, False, False]])
counts.row(0).add(mask_TE, True)
counts.row(1).add(mask_TE, torch.tensor([True, False]))
counts.row(1).add(mask_TE, False)
counts.row(1).add(mask_TE, True)
print(folder(), flush=True)
sys.stdin.read()
"""


def test_the_workers_counts_are_added_up_while_they_run(installed, tmp_path, monkeypatch):
    from gemoe_vllm.counts import FOLDER, Counts, folder, read

    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert folder() == tmp_path and read(tmp_path).shape == (0, 2)
    worker = subprocess.Popen(
        [sys.executable, "-c", CODE],
        env=os.environ | {"PYTHONPATH": str(installed)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout.readline() == f"{tmp_path}\n"
    assert read(tmp_path).tolist() == [[2, 3], [3, 5]]
    Counts(tmp_path, 3, torch.device("cpu")).row(2).add(torch.ones(4, 8) > 0, True)
    assert read(tmp_path).tolist() == [[2, 3], [3, 5], [4, 32]]
    worker.communicate("", timeout=30)
    assert read(tmp_path)[0].tolist() == [2, 3], "a worker that ended has served"


def test_the_first_process_makes_the_folder_and_removes_it(installed):
    environment = {k: v for k, v in os.environ.items() if k != "GEMOE_VLLM_COUNTS"}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=environment | {"PYTHONPATH": str(installed)},
        input="",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "gemoe-vllm-" in done.stdout and not os.path.exists(done.stdout.strip())


def test_on_a_device_the_file_gets_what_was_copied_before(tmp_path, monkeypatch):
    """A device's counters, here on the CPU."""
    import gemoe_vllm.counts as module

    monkeypatch.setattr(module, "_SECONDS", 0.0)
    counts = module.Counts(tmp_path, 1, torch.device("cpu"))
    counts.device_L2 = torch.zeros(1, 2, dtype=torch.int64)
    mask_TE = torch.ones(3, 4, dtype=torch.bool)
    counts.row(0).add(mask_TE, torch.tensor([True, True, False]))
    counts.publish()
    counts.publish()
    assert module.read(tmp_path).tolist() == [[2, 8]]
