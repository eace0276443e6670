"""Checkpoints whose writing fails or is waited for."""

from __future__ import annotations

import pytest

from gemoe_ds.checkpoint.manifest import find
from tests.helpers import run_ranks
from tests.train.resuming import (
    CUT,
    Setup,
    losses,
    setup_config,
    train_all,
    write_setting,
)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("resume"))


def full_disk_on_rank_1(rank: int, config) -> str | None:
    """Its second checkpoint does not fit."""
    from gemoe_ds.checkpoint import writer

    write, calls = writer.save_file, []

    def limited(tensors, path):
        calls.append(path)
        if rank == 1 and "step-000006" in str(path):
            raise OSError(28, "No space left on device", str(path))
        write(tensors, path)

    writer.save_file = limited
    return train_all(rank, [config])


def test_a_save_that_fails_on_one_rank_stops_all_and_harms_nothing(setting, tmp_path):
    output = tmp_path / "run"
    setup = Setup(2, 2, 2)  # trainable experts: both ranks write
    config = setup_config(setting, output, setup, "all")
    first, second = run_ranks(full_disk_on_rank_1, 2, config)
    assert first == second and "No space left" in first and "older ones are untouched" in first
    found, _ = find("auto", output, {})
    assert found is not None and found.step == CUT
    assert not list((output / "checkpoints").glob(".writing*")), "nothing half-written stays"
    goes_on = setup_config(setting, output, setup, "all", resume="auto")
    assert run_ranks(train_all, 2, [goes_on]) == [None, None]
    assert losses(output).keys() == set(range(1, 24))


def broken_after_a_save(rank: int, config) -> str | None:
    """Writing takes long, and the step after it fails."""
    import time

    from gemoe_ds.checkpoint import writer
    from gemoe_ds.errors import DataError
    from gemoe_ds.train.trainer import Trainer

    write, train_step = writer.save_file, Trainer.train_step

    def slow(tensors, path):
        time.sleep(1.5)
        write(tensors, path)

    def breaking(self, step, batches, *, collect):
        if step == CUT + 1:
            raise DataError("an image is broken")
        return train_step(self, step, batches, collect=collect)

    writer.save_file, Trainer.train_step = slow, breaking
    return train_all(rank, [config])


def test_a_run_that_breaks_lets_its_checkpoint_be_written(setting, tmp_path):
    config = setup_config(setting, tmp_path / "run", Setup(2, 2, 2), "routers")
    assert run_ranks(broken_after_a_save, 2, config) == ["an image is broken"] * 2
    found, _ = find("auto", tmp_path / "run", {})
    assert found is not None and found.step == CUT
