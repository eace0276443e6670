"""A signal to one rank: all save the same step, leave with 75, and the run goes on as if uncut."""

from __future__ import annotations

import json
import signal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gemoe_ds.checkpoint.manifest import newest
from gemoe_ds.errors import REQUEUE
from tests.cluster.launches import STEPS, metrics, ranks, write_recipe
from tests.train.resuming import write_data, write_setting
from tests.train.sample_logs import read_sample_log


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("stopping"))


@pytest.fixture(scope="module")
def uncut(setting):
    """Losses and sample log of the run that nobody stopped."""
    recipe, output = write_recipe(setting, setting["root"] / "uncut")
    with ranks(output.parent, recipe, 2) as running:
        assert running.codes() == [0, 0], running.log(0)[-3000:]
    return {line["step"]: line["loss/lm"] for line in metrics(output)}, read_sample_log(output)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
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
    losses, sample_log = uncut
    assert {line["step"]: line["loss/lm"] for line in metrics(output)} == losses
    assert read_sample_log(output) == sample_log
    board = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    shown = {event.step: event.value for event in board.Scalars("loss/lm")}
    assert len(board.Scalars("loss/lm")) == STEPS, "each step once"
    assert shown == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("words", ["MoE layers of backbone", "frozen "])
def test_asked_before_the_first_step(setting, tmp_path, words):
    """While it loads, and while it trains its first steps: nothing to save, or what there is."""
    recipe, output = write_recipe(setting, tmp_path)
    with ranks(tmp_path / "logs", recipe, 2) as running:
        running.wait_until(lambda: words in running.log(0))
        running.signal(1, signal.SIGTERM)
        assert running.codes() == [REQUEUE] * 2, running.log(0)[-3000:]
        assert "stopped: SIGTERM to rank 1" in running.log(0)


SLOW = """
import os, sys, time
sys.path.insert(0, os.getcwd())
{how}
from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.cli.train import main
main(sys.argv[1:], StopRequest().listen())
"""
SLOW_SAVE = """
from gemoe_ds.checkpoint import writer
write = writer.save_file
def slow(tensors, path):
    print("writing", path, flush=True)
    time.sleep(0.5)
    write(tensors, path)
writer.save_file = slow
"""
SLOW_DATA = """
from gemoe_ds.data.stream import TrainStream
following = TrainStream.__next__
def slow(self):
    self.number = getattr(self, "number", 0) + 1
    if self.number == 6 and os.environ["RANK"] == "1":
        print("waiting for data", flush=True)
        time.sleep(3)
    return following(self)
TrainStream.__next__ = slow
"""


@pytest.mark.parametrize(
    "how, says, asked",
    [
        pytest.param(SLOW_SAVE, "writing", 0, marks=pytest.mark.slow),
        pytest.param(SLOW_SAVE, "writing", 1, marks=pytest.mark.slow),
        (SLOW_DATA, "waiting for data", 1),
    ],
)
def test_asked_while_saving_or_waiting_for_data(setting, uncut, tmp_path, how, says, asked):
    recipe, output = write_recipe(setting, tmp_path, checkpoint={"every": 4, "keep": 50})
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(how=how))
    with ranks(tmp_path / "first", recipe, 2, script=script) as running:
        speaker = 1 if how is SLOW_DATA else 0  # the first rank writes
        running.wait_until(lambda: says in running.log(speaker))
        running.signal(asked, signal.SIGUSR1)
        assert running.codes() == [REQUEUE] * 2, running.log(0)[-3000:]
        assert f"stopped: SIGUSR1 to rank {asked}, after step " in running.log(0)
    assert newest(output)
    with ranks(tmp_path / "second", recipe, 2) as running:
        assert running.codes() == [0, 0], running.log(0)[-3000:]
    losses, sample_log = uncut
    assert {line["step"]: line["loss/lm"] for line in metrics(output)} == losses
    assert read_sample_log(output) == sample_log


@pytest.fixture(scope="module")
def trained(setting):
    few = {"steps": 2, "micro_batch_size": 1}
    recipe, output = write_recipe(setting, setting["root"] / "trained", train=few)
    with ranks(output.parent, recipe, 2) as running:
        assert running.codes() == [0, 0], running.log(0)
    return output


def evaluation(setting, trained, out) -> list[str]:
    """Two settings, of which each takes some seconds."""
    data = setting["root"] / "many"
    if not data.exists():
        write_data(data, 600)
    return ["--k", "2", "3", "--data", str(data), "--out", str(out), "--batch", "1"]


@pytest.mark.parametrize("asked", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_asked_while_evaluating(setting, trained, tmp_path, asked):
    """What is done is kept, and the next start leaves it alone."""
    out, run, script = tmp_path / "out", trained / "config.yaml", "launch/evaluate.py"
    arguments = evaluation(setting, trained, out)
    with ranks(tmp_path / "first", run, 2, *arguments, script=script) as running:
        running.wait_until(lambda: "evaluating top_k k=3" in running.log(0))
        running.signal(asked, signal.SIGTERM)
        assert running.codes() == [REQUEUE] * 2, running.log(0)[-3000:]
        assert f"stopped: SIGTERM to rank {asked}, between two batches" in running.log(0)
    assert (out / "k_2/eval.json").exists() and not (out / "k_3").exists()
    before = (out / "k_2/eval.json").read_text()
    again = [*arguments, "--skip-done"]
    with ranks(tmp_path / "second", run, 2, *again, script=script) as running:
        assert running.codes() == [0, 0], running.log(0)[-3000:]
    assert (out / "k_2/eval.json").read_text() == before
    assert json.loads((out / "k_3/eval.json").read_text())["k"] == 3
