"""Which backend serves which device; the launchers' tests are in tests/cluster."""

from __future__ import annotations

import resource

import torch.distributed as dist

from gemoe_ds.engine import rendezvous
from gemoe_ds.engine.world import distributed, gather_objects
from gemoe_ds.errors import ConfigError
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


def limits_in_a_world(rank: int, soft: int, hard: int) -> tuple[int, int] | str:
    """What is allowed behind the rendezvous, and how many connections there are; or its error."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        with distributed():
            return resource.getrlimit(resource.RLIMIT_NOFILE)
    except ConfigError as error:
        return str(error)


def test_as_many_files_may_be_open_as_the_ranks_need():
    (allowed,) = {*run_ranks(limits_in_a_world, 2, 256, 4096)}
    needed = 2 * rendezvous._FILES_A_RANK + rendezvous._FILES
    assert allowed == (needed, 4096)
    assert {*run_ranks(limits_in_a_world, 2, 2000, 4096)} == {(2000, 4096)}, "left as it was"


def test_too_few_open_files_are_named_before_anybody_waits():
    for line in run_ranks(limits_in_a_world, 2, 256, 300):
        assert "may open 300 files here, and one of 2 ranks needs" in line
        assert "ulimit -Hn" in line
