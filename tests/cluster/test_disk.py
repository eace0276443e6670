"""Disks that fill up, turn read-only or go away under a run, on a real file system, as root."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from gemoe_ds.checkpoint.manifest import newest, step_of
from gemoe_ds.errors import MISTAKE
from tests.cluster.launches import metrics, ranks, write_recipe
from tests.train.resuming import write_setting
from tests.train.sample_logs import read_sample_log

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount"),
]
SIZE = 64 * 2**20


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("disk"))


@contextmanager
def small_disk(place: Path):
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path) -> None:
    with open(place / "filler", "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(2**16)):
            pass


def slow(steps: int = 100_000) -> dict:
    """Steps that go on while the disk is harmed."""
    return {"train": {"steps": steps, "micro_batch_size": 1, "global_batch_size": 2}}


@pytest.mark.parametrize("tensorboard", [False, True])
def test_all_stop_on_a_full_disk_and_go_on_when_there_is_room(
    setting, tmp_path, tensorboard, record_property
):
    every = {"checkpoint": {"every": 4, "keep": 3}, "monitor__tensorboard": tensorboard}
    with small_disk(tmp_path / "disk") as disk:
        recipe, output = write_recipe(setting, disk / "job", **slow(), **every)
        with ranks(tmp_path / "first", recipe, 2) as running:
            running.wait_for_step(output, 10)
            fill(disk)
            began = time.monotonic()
            assert running.codes(60) == [MISTAKE] * 2, running.log(0)[-3000:]
            record_property("detected", time.monotonic() - began)
            said = running.log(0) + running.log(1)
            assert "No space left on device" in said, said[-3000:]
            assert "Traceback" not in said or tensorboard  # of its own thread
        (disk / "filler").unlink()
        kept = step_of(newest(output))
        assert kept >= 8
        recipe.write_text(recipe.read_text().replace("steps: 100000", f"steps: {kept + 20}"))
        with ranks(tmp_path / "second", recipe, 2) as running:
            assert running.codes() == [0, 0], running.log(0)[-3000:]
            assert f"step-{kept:06d}" in running.log(0)
        steps = [line["step"] for line in metrics(output)]
        assert steps == list(range(1, kept + 21)) and list(read_sample_log(output)) == steps


def test_a_read_only_disk_is_named_before_anything_is_loaded(setting, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        recipe, output = write_recipe(setting, disk / "job")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with ranks(tmp_path / "logs", recipe, 2) as running:
            assert running.codes() == [MISTAKE] * 2
            assert f"cannot write to output_dir={output}: Read-only file" in running.log(0)
            assert "loading" not in running.log(0)


def test_a_folder_that_goes_away_is_not_begun_anew(setting, tmp_path):
    """As when its file system is unmounted: the name is there, and what was in it is not."""
    recipe, output = write_recipe(
        setting, tmp_path / "job", **slow(), checkpoint={"every": 4, "keep": 3}
    )
    with ranks(tmp_path / "first", recipe, 2) as running:
        running.wait_for_step(output, 10)
        output.rename(tmp_path / "gone")
        output.mkdir()
        assert running.codes(60) == [MISTAKE] * 2, running.log(0)[-3000:]
        assert "is not the folder any more that the run began in" in running.log(0)
        assert "Traceback" not in running.log(0) + running.log(1)
    assert not list(output.iterdir()), "nothing new under the old name"
    assert newest(tmp_path / "gone")


def test_a_disk_that_is_too_small_is_refused_at_once(setting, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        recipe, output = write_recipe(setting, disk / "job")
        fill(disk)
        with ranks(tmp_path / "logs", recipe, 2) as running:
            assert running.codes() == [MISTAKE] * 2
            assert "GiB free for output_dir=" in running.log(0), running.log(0)
        assert not output.exists()
