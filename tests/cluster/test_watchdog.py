"""Ranks that are stopped, killed, stuck or failing: the others say who, where and when, and end."""

from __future__ import annotations

import re
import signal
import time

import pytest

from gemoe_ds.checkpoint.manifest import newest
from gemoe_ds.errors import BUG, STALLED
from tests.cluster.launches import STEPS, harmed, metrics, ranks, write_recipe
from tests.train.resuming import write_data, write_setting

BOUND = 6.0


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("watch"))


def slow_recipe(setting, folder):
    """More steps than a test waits for."""
    return write_recipe(
        setting,
        folder,
        train={"steps": 100_000, "micro_batch_size": 1, "global_batch_size": 2},
        checkpoint={"every": 3, "keep": 3},
        monitor__stall_seconds=BOUND,
    )


POSITION = r"step \d+, (waiting for data|forward and backward|update|saving|training)"


FIRST = pytest.param(0, marks=pytest.mark.slow)


@pytest.mark.parametrize("victim", [FIRST, 1])
def test_a_stopped_rank_is_named_by_the_other(setting, tmp_path, victim, record_property):
    recipe, output = slow_recipe(setting, tmp_path)
    with ranks(tmp_path / "logs", recipe, 2) as running:
        running.wait_for_step(output, 5)
        time.sleep(BOUND / 5)  # what was seen last may be a beat old
        running.signal(victim, signal.SIGSTOP)
        began = time.monotonic()
        other = 1 - victim
        assert running.processes[other].wait(3 * BOUND) == STALLED, running.log(other)
        record_property("detected", time.monotonic() - began)
        assert time.monotonic() - began < BOUND + 4
        said = running.log(other)
        assert f"error: rank {victim} (host " in said
        assert re.search(rf"Rank {other} \(host \S+\) was at: {POSITION}", said), said
        assert re.search(rf"silent for \d+ s; it was last seen at: {POSITION}", said), said
        running.signal(victim, signal.SIGCONT)  # and if it wakes up, it ends too
        assert running.processes[victim].wait(3 * BOUND) != 0
    assert newest(output)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named_by_the_other(setting, tmp_path, victim, record_property):
    recipe, output = slow_recipe(setting, tmp_path)
    with ranks(tmp_path / "logs", recipe, 2) as running:
        running.wait_for_step(output, 5)
        running.signal(victim, signal.SIGKILL)
        began = time.monotonic()
        other = 1 - victim
        assert running.processes[other].wait(2 * BOUND) == STALLED, running.log(other)
        record_property("detected", time.monotonic() - began)
        assert f"error: rank {victim} (host " in running.log(other)


@pytest.mark.parametrize(
    "harm, words",
    [
        ("raise ValueError('boom')", "rank 1 (host {}) failed: ValueError: boom"),
        ("time.sleep(1000)", "rank 1 (host {}) has not moved for"),
    ],
)
def test_a_rank_that_fails_or_is_stuck_is_named(setting, tmp_path, harm, words):
    recipe, _ = slow_recipe(setting, tmp_path)
    script = harmed(tmp_path / "harmed.py", harm, when="number == 5")
    with ranks(tmp_path / "logs", recipe, 2, script=script) as running:
        began = time.monotonic()
        codes = running.codes()
        assert all(codes), codes
        assert codes[0] == (BUG if "raise" in harm else STALLED), running.log(0)
        said = running.log(0)
        host = re.search(r"Rank 0 \(host (\S+)\)", said)
        assert host and words.format(host[1]) in said, said
        assert time.monotonic() - began < 60


KILL = "trainer.PROGRESS.wait_for = lambda collective: os.kill(os.getpid(), 9)"


def test_killed_and_resumed(setting, tmp_path, record_property):
    """In the next collective of a step: the same command goes on from the newest checkpoint."""
    recipe, output = write_recipe(
        setting, tmp_path, checkpoint={"every": 2, "keep": 2}, monitor__stall_seconds=BOUND
    )
    script = harmed(tmp_path / "harmed.py", KILL, when="number == 5")
    with ranks(tmp_path / "first", recipe, 2, script=script) as running:
        codes = running.codes()
        assert codes == [STALLED, -signal.SIGKILL], running.log(0)
        assert "error: rank 1 (host " in running.log(0)
    began = time.monotonic()
    with ranks(tmp_path / "second", recipe, 2) as running:
        running.wait_for_step(output, 6)
        record_property("recovered", time.monotonic() - began)
        assert running.codes() == [0, 0], running.log(0)
        assert "resumed from" in running.log(0) and "step-000004" in running.log(0)
    steps = [line["step"] for line in metrics(output)]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS


STUCK_SAVE = """
import os, sys, time
sys.path.insert(0, os.getcwd())
from gemoe_ds.checkpoint import writer
def stuck(tensors, path):
    time.sleep(1000)
writer.save_file = stuck
from gemoe_ds.cli.train import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_save_that_never_ends_is_named(setting, tmp_path):
    """As on a file system that has gone: nobody moves, for ten times the bound."""
    recipe, output = write_recipe(
        setting, tmp_path, checkpoint={"every": 2, "keep": 2}, monitor__stall_seconds=1.0
    )
    script = tmp_path / "stuck.py"
    script.write_text(STUCK_SAVE)
    with ranks(tmp_path / "logs", recipe, 2, script=script) as running:
        assert running.codes() == [STALLED] * 2, running.log(0)
        assert re.search(
            r"has not moved for 1\d s; it was last seen at: step \d, saving", running.log(1)
        )


@pytest.mark.slow
def test_a_rank_that_is_killed_while_evaluating_is_named(setting, tmp_path):
    recipe, output = write_recipe(setting, tmp_path, train={"steps": 2, "micro_batch_size": 1})
    with ranks(tmp_path / "train", recipe, 2) as running:
        assert running.codes() == [0, 0], running.log(0)
    data = write_data(tmp_path / "many", 1000)
    arguments = [
        "--trained",
        str(output),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "out"),
        "--batch",
        "1",
    ]
    script = "launch/evaluate.py"
    with ranks(tmp_path / "logs", output / "config.yaml", 2, *arguments, script=script) as running:
        running.wait_until(lambda: "evaluating:" in running.log(0))
        running.signal(1, signal.SIGKILL)
        assert running.processes[0].wait(60) == STALLED, running.log(0)
        assert "error: rank 1 (host " in running.log(0) and "evaluating" in running.log(0)
    assert not (tmp_path / "out").exists()


def test_a_slow_rank_is_left_alone(setting, tmp_path):
    """Each step takes half of the bound, and all of them more than it."""
    recipe, output = write_recipe(
        setting,
        tmp_path,
        train={"steps": 4, "micro_batch_size": 1, "global_batch_size": 2},
        monitor__stall_seconds=2.0,
    )
    script = harmed(tmp_path / "slow.py", "time.sleep(1.0)", when="number > 0")
    with ranks(tmp_path / "logs", recipe, 2, script=script) as running:
        assert running.codes() == [0, 0], running.log(0)
    assert newest(output)
