"""A bar at a terminal, lines in a file; single messages are left out, the others are not."""

from __future__ import annotations

import io
import logging
import sys
from itertools import pairwise

import pytest

from gemoe_ds import console
from gemoe_ds.console import Progress, without


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        monkeypatch.setattr("time.time", lambda: self.now)


class Written(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: is_terminal  # type: ignore[method-assign]


def run(monkeypatch, steps: int, seconds: float, *, is_terminal: bool = False, **options) -> str:
    clock, out = Clock(monkeypatch), Written(is_terminal)
    monkeypatch.setattr(sys, "stderr", out)
    bar = Progress(total=steps, desc="training", unit="step", file=out, **options)
    bar._time = lambda: clock.now  # tqdm keeps the function itself
    for step in range(steps):
        clock.now += seconds
        bar.update()
        bar.set_postfix(loss=step)
    bar.close()
    bar.close()
    return out.getvalue()


def test_a_line_a_minute_and_one_at_the_end(monkeypatch):
    lines = run(monkeypatch, 500, 1.0).splitlines()
    assert "\r" not in "".join(lines)
    steps = [int(line.split()[1]) for line in lines]
    assert steps[-1] == 500 and len(steps) == 9
    assert all(later - sooner >= 60 for sooner, later in pairwise(steps[:-1]))
    assert lines[-1].startswith("training: 500 of 500, ") and lines[-1].endswith("loss=499")


def test_steps_that_take_minutes_have_a_line_each(monkeypatch):
    assert len(run(monkeypatch, 3, 100.0).splitlines()) == 3 + 1  # and the end


def test_what_takes_no_time_or_is_another_rank_s_says_nothing(monkeypatch):
    assert run(monkeypatch, 5, 0.1) == ""
    assert run(monkeypatch, 500, 1.0, disable=True) == ""


def test_a_terminal_has_its_bar(monkeypatch):
    shown = run(monkeypatch, 5, 0.5, is_terminal=True)
    assert shown.count("\r") > 3 and "100%|" in shown


def test_messages_of_others_do_not_draw_a_bar_into_a_file(monkeypatch, capsys):
    out = Written(False)
    monkeypatch.setattr(sys, "stderr", out)
    with Progress(total=3, file=out) as bar:
        bar.update()
        Progress.write("left out: an image")
    assert out.getvalue() == "" and capsys.readouterr().out == "left out: an image\n"


def test_only_the_named_message_of_the_named_logger_is_left_out(caplog):
    logger, other = logging.getLogger("gemoe.a"), logging.getLogger("gemoe.b")
    with without("gemoe.a", "of no use"):
        logger.warning("a thing %s", "of no use")
        logger.warning("read this")
        other.warning("of no use")
    logger.warning("of no use, afterwards")
    assert caplog.messages == ["read this", "of no use", "of no use, afterwards"]
    assert console.EVERY == 60
