"""How many tokens a forward may have, by what is free for a rank."""

from __future__ import annotations

import socket
from typing import Any, cast

import pytest
import torch

from gemoe_ds.cluster import preflight
from gemoe_ds.engine.world import World
from gemoe_ds.evaluation.benchmarks import batch_size


def test_a_rank_has_its_part_of_its_own_host_and_of_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of eight ranks two are here; what the control group leaves of the host counts."""
    hosts = [socket.gethostname()] * 2 + ["elsewhere"] * 6
    monkeypatch.setattr(preflight, "gather_objects", lambda own: hosts)
    monkeypatch.setattr(preflight, "free_host_memory", lambda: 10 * 2**30)
    monkeypatch.setattr(batch_size, "gather_objects", lambda own: [own])
    monkeypatch.setattr(batch_size, "bytes_per_token", lambda model: 2**20)
    world = World(0, 8, torch.device("cpu"))
    found = batch_size.tokens_that_fit(cast(Any, None), 1, world)
    assert found == int(0.3 * 5 * 2**10)
