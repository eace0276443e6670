"""Servers without their processes."""

from __future__ import annotations

import pytest

import gemoe_ds.serving.check as check
from gemoe_ds.serving.ask_transformers import serve
from gemoe_ds.serving.exchange import read_job, write_job


@pytest.fixture
def in_this_process(monkeypatch):
    """Importing torch and transformers anew takes 11 seconds of a core for each way to route; the
    processes are tested in test_servers.py and, whole, in the slow test of test_check.py."""

    def run(server, job, work):
        write_job(job, work / "job.json")
        return serve(read_job(work / "job.json"))

    monkeypatch.setattr(check, "run", run)
