"""Faults of hosts and ranks are found before anything is loaded, each in a line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gemoe_ds.cluster.preflight import FREE_DISK, Passport, faults, preflight, remarks
from gemoe_ds.engine.distributed import distributed
from gemoe_ds.errors import ConfigError
from tests.helpers import run_ranks

FIT = Passport("a", "GPU-1", {"torch": "2.13.0"}, True, 2 * FREE_DISK, 80 * 2**30)
OUTPUT = Path("runs/x")


def found(*passports: Passport, needed: int | None = None, on_gpu: bool = True) -> list[str]:
    return list(faults(list(passports), OUTPUT, needed, on_gpu=on_gpu))


def test_fit_ranks_have_no_fault():
    assert found(FIT, replace(FIT, device="GPU-2"), replace(FIT, host="b")) == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"versions": {"torch": "2.12.1"}}, "has torch 2.12.1, rank 0 (host a) has 2.13.0"),
        ({"sees_output": False}, "does not see what rank 0 (host a) writes to output_dir=runs/x"),
        ({"free_disk": 2**20}, "has 0.0 GiB free for output_dir=runs/x"),
        ({"free_memory": 2**30}, "has 1.0 GiB of memory free, 3.0 are estimated"),
    ],
)
def test_a_fault_names_rank_host_value_and_way_out(changes, words):
    other = replace(FIT, host="b", **changes)
    (line,) = found(FIT, other, needed=3 * 2**30)
    assert line.startswith("rank 1 (host b) ") and words in line and "; " in line


def test_two_ranks_on_one_gpu():
    (line,) = found(FIT, FIT)
    assert line.startswith("ranks 0, 1 (host a) share the GPU GPU-1; ")
    assert found(FIT, FIT, on_gpu=False) == []


def test_cpu_ranks_share_their_host_s_memory():
    assert len(found(FIT, FIT, needed=50 * 2**30, on_gpu=False)) == 2
    assert found(FIT, replace(FIT, host="b"), needed=50 * 2**30, on_gpu=False) == []


@pytest.mark.parametrize(
    "hosts, ep_size, words",
    [("aabb", 2, None), ("abab", 2, "ranks 0 to 1 are on several hosts"), ("aabb", 4, "exceeds")],
)
def test_expert_groups_that_cross_hosts(hosts, ep_size, words):
    lines = list(remarks([replace(FIT, host=h) for h in hosts], ep_size))
    assert lines[0] == "preflight: 4 ranks on 2 hosts are fit"
    assert lines[1:] == [] if words is None else words in lines[1]


def in_a_world(rank: int, output: str, skewed: bool) -> list[str] | str:
    from gemoe_ds.cluster import preflight as module

    if skewed and rank == 1:
        module.version = lambda package: "0.0.1"
    with distributed() as world:
        try:
            return preflight(world, Path(output), ep_size=2)
        except ConfigError as error:
            return str(error)


@pytest.mark.parametrize("skewed", [False, True])
def test_real_ranks(tmp_path, skewed):
    first, second = run_ranks(in_a_world, 2, str(tmp_path / "runs/x"), skewed)
    assert first == second
    if skewed:
        assert "rank 1 (host " in first and "has torch 0.0.1" in first
    else:
        assert "2 ranks on 1 hosts are fit" in first[0] and "GB/s in an all-reduce" in first[1]
    assert not list(tmp_path.iterdir())
