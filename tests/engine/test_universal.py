"""Why checkpoints are our own: what DeepSpeed's universal checkpoint loses under ZeRO 3.

Two groups with other learning rates are saved, converted and loaded by DeepSpeed alone. If a test
here fails, DeepSpeed has been mended, and docs/checkpoints.md and gemoe_ds/checkpoint/writer.py
may be thought over again.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.helpers import run_ranks

pytestmark = pytest.mark.slow  # it is DeepSpeed alone that runs
RATES = (1e-2, 1e-4)


def engine_of(stage: int, universal: bool):
    import deepspeed

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    groups = [{"params": list(m.parameters()), "lr": r} for m, r in zip(model, RATES, strict=True)]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "checkpoint": {"load_universal": universal},
    }
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups), config=config)[0]


def train_and_save(rank: int, folder: str, stage: int) -> None:
    from gemoe_ds.engine.world import distributed

    with distributed():
        engine = engine_of(stage, universal=False)
        for _ in range(2):
            engine.backward(engine(torch.ones(1, 8)).square().sum())
            engine.step()
        engine.save_checkpoint(folder, tag="native")


def load(rank: int, folder: str) -> tuple[list[float], int, int]:
    """Rates after loading; how many Adam states there are, and how many `step` tensors."""
    from gemoe_ds.engine.world import distributed

    with distributed():
        engine = engine_of(3, universal=True)
        engine.load_checkpoint(folder, tag="universal")
        states = list(engine.optimizer.optimizer.state.values())
        rates = [group["lr"] for group in engine.optimizer.param_groups]
        return rates, len(states), len({id(state["step"]) for state in states})


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("universal")
    run_ranks(train_and_save, 2, str(folder), 3)
    convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    convert += ["--input_folder", folder / "native", "--output_folder", folder / "universal"]
    convert += ["--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(convert, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return run_ranks(load, 2, str(folder))[0]


def test_universal_zero_3_gives_all_groups_the_rate_of_the_first(loaded):
    rates, _, _ = loaded
    assert rates == [RATES[0]] * 2


def test_universal_zero_3_shares_one_step_counter_among_all_groups(loaded):
    """torch's AdamW then counts every step twice: the bias correction is wrong from there on."""
    _, num_states, num_counters = loaded
    assert (num_states, num_counters) == (2, 1)
