"""A run that has skipped too many steps can go on: what it skipped before does not count again."""

from __future__ import annotations

import math

import pytest

from gemoe_ds import train
from gemoe_ds.errors import DataError
from gemoe_ds.train.hooks import Hook
from tests.train.resuming import losses, make_config, write_setting


class Spoils(Hook):
    """A gradient of these steps is NaN."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def before_step(self, trainer, step, batches) -> None:
        if step in self.steps:
            parameter = next(iter(trainer.model.trainable().values()))
            handles = [
                parameter.register_hook(lambda grad: (handles.pop().remove(), grad * math.nan)[1])
            ]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("skipped"))


def config_of(setting, output, limit: int, **changes):
    return make_config(
        setting, output, train__max_skipped_steps=limit, parallel__ep_size=1, **changes
    )


def test_each_start_counts_anew_and_a_good_step_ends_no_run(setting, tmp_path, capfd):
    config = config_of(setting, tmp_path, 0, resume="auto")
    with pytest.raises(DataError, match="step 2: .* skipped for that since step 0: 1, and train.m"):
        train(config, hooks=[Spoils(2)])
    with pytest.raises(DataError, match="step 5: .* skipped for that since step 2: 1, .* raise tr"):
        train(config, hooks=[Spoils(5)])
    train(config)
    assert losses(tmp_path).keys() == {1, 2, 3, 4, 5, 6}


def test_so_many_may_be_skipped_after_a_start(setting, tmp_path):
    config = config_of(setting, tmp_path, 1, resume="auto", train__steps=4)
    train(config, hooks=[Spoils(3)])
    longer = config_of(setting, tmp_path, 1, resume="auto", train__steps=8)
    with pytest.raises(DataError, match="step 7: .* since step 4: 2, and"):
        train(longer, hooks=[Spoils(6, 7)])


def test_a_dry_run_of_a_continuation_looks_at_its_own_step(setting, tmp_path, capfd):
    train(config_of(setting, tmp_path, 1, train__steps=3), hooks=[Spoils(2)])
    train(config_of(setting, tmp_path, 1, resume="auto", train__steps=4), dry_run=True)
    assert "dry run: one step of" in capfd.readouterr().out
