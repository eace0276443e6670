"""A run that begins with another one's checkpoint: its own come first when it is started again."""

from __future__ import annotations

import pytest

from gemoe_ds import train
from gemoe_ds.checkpoint.manifest import candidates, step_of
from gemoe_ds.errors import CheckpointError, ConfigError
from tests.train.resuming import losses, make_config, write_setting


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("start from"))


def config_of(setting, output, steps, **changes):
    train_section = {"steps": steps, "micro_batch_size": 2, "gradient_accumulation_steps": 2}
    changes |= {"train": train_section, "checkpoint__every": 2, "parallel__ep_size": 1}
    return make_config(setting, output, **changes)


@pytest.fixture(scope="module")
def first(setting):
    """A run of four steps; its checkpoint after the second."""
    output = setting["root"] / "first"
    train(config_of(setting, output, 4))
    return output / "checkpoints/step-000002"


def test_the_checkpoint_comes_first_and_the_run_s_own_after_it(setting, first, tmp_path, capfd):
    again = config_of(setting, tmp_path, 4, resume="auto", start_from=str(first))
    train(again)
    assert f"resumed from {first}" in capfd.readouterr().out
    assert losses(tmp_path).keys() == {3, 4}
    longer = config_of(setting, tmp_path, 6, resume="auto", start_from=str(first))
    train(longer)
    said = capfd.readouterr().out
    assert f"resumed from {tmp_path}/checkpoints/step-000004" in said and "set aside" not in said
    assert losses(tmp_path).keys() == {3, 4, 5, 6}


def test_it_goes_with_resume_auto(setting, first, tmp_path):
    for resume in ("none", str(first)):
        config = config_of(setting, tmp_path, 4, resume=resume, start_from=str(first))
        with pytest.raises(ConfigError, match=f"start_from={first}: .*; set resume=auto, or"):
            train(config)


def test_one_of_another_run_is_refused(setting, first, tmp_path):
    config = config_of(setting, tmp_path, 4, resume="auto", start_from=str(first), seed=5)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        train(config)


def test_two_runs_are_not_mixed_in_one_folder(setting, first, tmp_path):
    """Neither with that of another run, nor with an earlier continuation of the same one."""
    output = tmp_path / "run"
    train(config_of(setting, output, 3, seed=5))
    before = (output / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="already holds a run; continue it with resume=auto"):
        train(config_of(setting, output, 4, resume=str(first)))
    assert (output / "metrics.jsonl").read_text() == before
    assert [step_of(folder) for folder in candidates(output)] == [3, 2]


def test_its_own_checkpoint_by_any_name_is_no_other_run(setting, first, tmp_path):
    output, link = tmp_path / "run", tmp_path / "link"
    train(config_of(setting, output, 3))
    link.symlink_to(output)
    train(config_of(setting, output, 4, resume=str(link / "checkpoints/step-000002")))
    assert losses(output).keys() == {1, 2, 3, 4}
