"""Which backend serves which device; the launchers' tests are in tests/cluster."""

from __future__ import annotations

import torch.distributed as dist

from gemoe_ds.engine import rendezvous
from gemoe_ds.engine.world import distributed, gather_objects
from tests.helpers import run_ranks


def test_a_backend_for_each_kind_of_device():
    assert rendezvous.backends_of("cpu", "gloo") == "gloo"
    assert rendezvous.backends_of("cuda", "nccl") == "cpu:gloo,cuda:nccl"


def gathered_from_cpus(rank: int) -> tuple[list, str]:
    """With a second backend that no CPU tensor may touch, as NCCL is."""
    rendezvous.backends_of = lambda device, backend: "cpu:gloo,cuda:gloo"
    with distributed():
        asked = dist.distributed_c10d._get_object_coll_device()
        return gather_objects(rank), asked


def test_objects_are_gathered_from_cpus_where_gpus_have_a_backend_too():
    """So that the watch is up before the first collective of NCCL."""
    for ranks, device in run_ranks(gathered_from_cpus, 2):
        assert ranks == [0, 1] and device == "cpu"
