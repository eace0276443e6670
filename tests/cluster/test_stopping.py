"""A request to stop, as signals make it."""

from __future__ import annotations

import os
import signal
import time

from gemoe_ds.cluster.stopping import StopRequest


def test_ctrl_c_stops_and_a_second_one_ends_at_once(monkeypatch, capfd):
    """One Ctrl-C may arrive twice: from the terminal, and from the launcher."""
    stop, ended, now = StopRequest(), [], [100.0]
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.delenv("RANK", raising=False)
    for later, codes in ((0.0, []), (0.4, []), (2.0, [130])):
        now[0] = 100.0 + later
        stop._note(signal.SIGINT, None)
        assert (stop.by, ended) == ("SIGINT", codes)
    assert capfd.readouterr().err == "\nSIGINT: stops after this step; again: ends at once\n"
