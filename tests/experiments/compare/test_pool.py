"""Steps side by side."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from experiments.compare.pool import Pool
from experiments.steps import Progress, Step


def step(folder: Path, name: str, code: str, needs: tuple[str, ...] = ()) -> Step:
    out = folder / name
    command = ("/bin/sh", "-c", f"mkdir {out}; {code}")
    return Step(name, command, out, 1, needs)


def pool(folder: Path, steps: list[Step], width: int = 2) -> Pool:
    return Pool(steps, Progress(folder / "steps", steps), width, folder / "logs")


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr("experiments.compare.pool.POLL", 0.01)


def test_they_run_side_by_side_and_wait_for_what_they_need(tmp_path, capsys):
    there = f"[ -e {tmp_path}/a ] && [ -e {tmp_path}/b ]"
    both = f"until {there}; do sleep 0.01; done"  # neither ends without the other
    steps = [
        step(tmp_path, "b", f"{both}; touch {tmp_path}/b/whole"),
        step(tmp_path, "c", f"test -e {tmp_path}/b/whole && echo all of b", ("b",)),
        step(tmp_path, "a", both),
    ]
    assert pool(tmp_path, steps).run() == 0
    assert (tmp_path / "logs/c.log").read_text() == "all of b\n"
    lines = capsys.readouterr().out.splitlines()
    assert "3 runs, 2 at a time: about 0:01 on 2 cores" in lines[0]
    assert "| 3 of 3: c took 0:00 (" in lines[-1] and "100%" in lines[-1]
    assert pool(tmp_path, steps).run() == 0
    assert "3 of 3 runs are done already" in capsys.readouterr().out


def test_a_failure_stops_only_what_needs_it_and_is_tried_again(tmp_path, capsys):
    flag = tmp_path / "mended"
    steps = [
        step(tmp_path, "bad", f"echo why; test -e {flag}"),
        step(tmp_path, "after", "true", ("bad",)),
        step(tmp_path, "good", "true"),
    ]
    assert pool(tmp_path, steps, width=1).run() == 1
    said = capsys.readouterr().err
    assert "== bad failed:\nwhy" in said and "not done: after" in said
    assert (tmp_path / "good").exists() and not (tmp_path / "after").exists()
    flag.touch()
    again = pool(tmp_path, steps, width=1)
    assert [s.name for s in again.waiting] == ["bad", "after"]
    assert again.run() == 0


def test_an_interrupt_ends_what_runs_and_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    steps = [step(tmp_path, "quick", "true"), step(tmp_path, "long", "exec sleep 60")]
    begun, sleep = time.monotonic(), time.sleep

    def interrupted(seconds: float) -> None:
        sleep(seconds)
        if (tmp_path / "steps/quick.json").exists() and "done" in (
            tmp_path / "steps/quick.json"
        ).read_text():
            raise KeyboardInterrupt

    running = pool(tmp_path, steps)
    with monkeypatch.context() as patch:
        patch.setattr("experiments.compare.pool.time.sleep", interrupted)
        assert running.run() == 130
    assert time.monotonic() - begun < 30 and "continue from here" in capsys.readouterr().out
    assert running.running["long"][1].returncode != 0
    assert [s.name for s in pool(tmp_path, steps).waiting] == ["long"]
