"""A signal to one rank: all save the same step, leave with 75, and the run goes on as if uncut."""

from __future__ import annotations

import signal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gemoe_ds.engine.manifest import newest
from gemoe_ds.errors import REQUEUE
from gemoe_ds.train.ledger import read_ledger
from tests.cluster.launches import metrics, ranks
from tests.train.resuming import make_config, write_setting

STEPS = 40


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("stopping"))


def write_recipe(setting, folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    changes = {
        "train": {"steps": STEPS, "micro_batch": 1, "global_batch": 2},
        "checkpoint": {"every": 0, "keep": 50},
        "monitor__ledger": True,
        "resume": "auto",
    } | changes
    config = make_config(setting, folder / "run", **changes)
    (folder / "recipe.yaml").write_text(config.dump_yaml())
    return folder / "recipe.yaml", folder / "run"


@pytest.fixture(scope="module")
def uncut(setting):
    """Losses and ledger of the run that nobody stopped."""
    recipe, output = write_recipe(setting, setting["root"] / "uncut")
    with ranks(output.parent, recipe, 2) as running:
        assert running.codes() == [0, 0], running.log(0)[-3000:]
    return {line["step"]: line["loss/lm"] for line in metrics(output)}, read_ledger(output)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_one_rank_is_asked_and_all_save_and_the_run_goes_on(setting, uncut, tmp_path, number):
    recipe, output = write_recipe(setting, tmp_path, monitor__tensorboard=True)
    asked = 1 if number == signal.SIGTERM else 0
    with ranks(tmp_path / "first", recipe, 2) as running:
        running.wait_for_step(output, 5)
        seen = metrics(output)[-1]["step"]
        running.signal(asked, number)
        running.signal(asked, number)  # a second one is harmless
        assert running.codes() == [REQUEUE] * 2, running.log(0)[-3000:]
        assert f"stopped: {number.name} to rank {asked}, after step " in running.log(0)
        assert "Traceback" not in running.log(0) + running.log(1)
    saved = int(newest(output).name.removeprefix("step-"))
    assert seen <= saved <= seen + 3, "the step under way, and those between line and signal"
    with ranks(tmp_path / "second", recipe, 2) as running:
        assert running.codes() == [0, 0], running.log(0)[-3000:]
    losses, ledger = uncut
    assert {line["step"]: line["loss/lm"] for line in metrics(output)} == losses
    assert read_ledger(output) == ledger
    board = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    shown = {event.step: event.value for event in board.Scalars("loss/lm")}
    assert len(board.Scalars("loss/lm")) == STEPS, "each step once"
    assert shown == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("words", ["MoE layers of backbone", "training:"])
def test_asked_before_the_first_step(setting, tmp_path, words):
    """While it loads, and while it trains its first steps: nothing to save, or what there is."""
    recipe, output = write_recipe(setting, tmp_path)
    with ranks(tmp_path / "logs", recipe, 2) as running:
        running.wait_until(lambda: words in running.log(0))
        running.signal(1, signal.SIGTERM)
        assert running.codes() == [REQUEUE] * 2, running.log(0)[-3000:]
        assert "stopped: SIGTERM to rank 1" in running.log(0)
