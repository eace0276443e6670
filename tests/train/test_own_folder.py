"""Two processes do not write into one output_dir."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gemoe_ds import train
from gemoe_ds.engine.world import World, distributed
from gemoe_ds.errors import ConfigError
from gemoe_ds.train import own_folder as module
from gemoe_ds.train.own_folder import LOCK, own_folder
from tests.train.resuming import losses, make_config, write_setting

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def group():
    with distributed():
        yield


@pytest.fixture
def other(tmp_path):
    """Another process that holds tmp_path/run, until its standard input ends."""
    code = (
        "import sys, gemoe_ds.train.own_folder as m; from pathlib import Path; "
        "held = m._held(Path(sys.argv[1])); held.__enter__(); print(1, flush=True); "
        "sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], **pipes) as process:
        assert process.stdout.readline() == b"1\n"
        yield process
        process.kill()


def test_a_second_start_is_one_line(tmp_path_factory, tmp_path, other):
    setting = write_setting(tmp_path_factory.mktemp("setting"))
    config = make_config(setting, tmp_path / "run", parallel__ep_size=1, train__steps=2)
    said = f"run is in use by process {other.pid} on host {socket.gethostname()}; wait for its end"
    with pytest.raises(ConfigError, match=said):
        train(config)
    assert os.listdir(tmp_path / "run") == [LOCK]
    train(config, dry_run=True)  # which writes nothing
    other.kill()
    other.wait()
    train(config)
    assert losses(tmp_path / "run").keys() == {1, 2} and not (tmp_path / "run" / LOCK).exists()


def test_a_requeued_job_waits_for_the_one_before(tmp_path, group, other, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(module.time, "sleep", lambda seconds: (other.kill(), other.wait()))
    with own_folder(tmp_path / "run", ALONE):
        assert f"process {os.getpid()} on" in (tmp_path / "run" / LOCK).read_text()


def test_nothing_is_left_of_a_run_that_wrote_nothing(tmp_path, group):
    with own_folder(tmp_path / "new/run", ALONE):
        assert (tmp_path / "new/run" / LOCK).exists()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with own_folder(tmp_path / "old", ALONE):
        pass
    assert os.listdir(tmp_path / "old") == []


def test_nothing_is_left_on_a_full_disk(tmp_path, group, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "write", refuse)
    with own_folder(tmp_path / "new/run", ALONE):
        pass
    assert not (tmp_path / "new").exists()


def test_a_file_system_without_locks_stops_nobody(tmp_path, group, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with own_folder(tmp_path / "run", ALONE):
        (tmp_path / "run/metrics.jsonl").write_text(json.dumps({}))
    assert os.listdir(tmp_path / "run") == ["metrics.jsonl"]


def test_a_folder_that_cannot_be_made_is_for_others_to_name(tmp_path, group):
    (tmp_path / "file").write_text("x")
    with own_folder(tmp_path / "file/run", ALONE):
        pass


def test_an_error_of_the_run_is_not_hidden(tmp_path, group):
    with pytest.raises(OSError, match="the run's"), own_folder(tmp_path / "run", ALONE):
        raise OSError("the run's")
    assert not Path(tmp_path / "run").exists()
