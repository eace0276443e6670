"""Faults of hosts and ranks are found before anything is loaded, each in a line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gemoe_ds.cluster import preflight as module
from gemoe_ds.cluster.preflight import (
    FREE_DISK,
    RankReport,
    errors,
    free_for_a_rank,
    free_host_memory,
    preflight,
    ranks_by_host,
    warnings,
)
from gemoe_ds.engine.world import World, distributed
from gemoe_ds.errors import ConfigError
from tests.helpers import run_ranks

FIT = RankReport("a", "GPU-1", {"torch": "2.13.0"}, "", True, 2 * FREE_DISK, 80 * 2**30)
OUTPUT = Path("runs/x")


def found(*reports: RankReport, needed: int | None = None, on_gpu: bool = True) -> list[str]:
    return list(errors(list(reports), OUTPUT, needed, FREE_DISK, on_gpu=on_gpu))


def test_fit_ranks_have_no_error():
    assert found(FIT, replace(FIT, device="GPU-2"), replace(FIT, host="b")) == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"versions": {"torch": "2.12.1"}}, "has torch 2.12.1, rank 0 (host a) has 2.13.0"),
        ({"cannot_write": "Read-only file system"}, "cannot write to output_dir=runs/x: Read-only"),
        ({"sees_output": False}, "does not see what rank 0 (host a) writes to output_dir=runs/x"),
        (
            {"free_disk": 2**19},
            "has 0.00 GiB free for output_dir=runs/x, and 0.02 GiB may",
        ),
        ({"free_memory": 2**30}, "has 1.00 GiB of memory free, 3.00 GiB more are"),
    ],
)
def test_an_error_names_rank_host_value_and_way_out(changes, words):
    other = replace(FIT, host="b", **changes)
    (line,) = found(FIT, other, needed=3 * 2**30)
    assert line.startswith("rank 1 (host b) ") and words in line and "; " in line


def test_an_error_of_many_ranks_is_said_once():
    full = [replace(FIT, device=f"GPU-{n}", cannot_write="No space left") for n in range(8)]
    (line,) = found(*full[:2])
    assert line.startswith("rank 0 (host a) cannot write") and line.count("cannot write") == 1
    assert line.endswith(" (the same on rank 1 (host a))")
    (line,) = found(*full)
    assert line.endswith(" (the same on 7 other ranks)")


def test_two_ranks_on_one_gpu():
    (line,) = found(FIT, FIT)
    assert line.startswith("ranks 0, 1 (host a) share the GPU GPU-1; ")
    assert found(FIT, FIT, on_gpu=False) == []


def test_cpu_ranks_share_their_host_s_memory():
    (line,) = found(FIT, FIT, needed=50 * 2**30, on_gpu=False)
    assert line.startswith("rank 0 (host a) has 40.00 GiB of memory free, 50.00 GiB more")
    assert found(FIT, replace(FIT, host="b"), needed=50 * 2**30, on_gpu=False) == []


@pytest.mark.parametrize(
    "hosts, ep_size, words",
    [("aabb", 2, None), ("abab", 2, "ranks 0 to 1 are on several hosts"), ("aabb", 4, "exceeds")],
)
def test_expert_groups_that_cross_hosts(hosts, ep_size, words):
    lines = list(warnings([replace(FIT, host=h) for h in hosts], ep_size))
    assert lines[0] == "preflight: 4 ranks on 2 hosts are fit"
    assert lines[1:] == [] if words is None else words in lines[1]


@pytest.mark.parametrize(
    "line, folder, limit, used, prefix",
    [
        ("0::/job_7", "job_7", "memory.max", "memory.current", ""),
        ("0::/job_7/step_0/task_0", "job_7", "memory.max", "memory.current", ""),  # as SLURM has it
        ("0::/job_7", "", "memory.max", "memory.current", ""),  # as seen in a container
        (
            "4:memory:/job_7",
            "memory/job_7",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_",
        ),
    ],
)
def test_memory_is_what_the_job_was_given(tmp_path, line, folder, limit, used, prefix):
    """Control groups of both versions; what files are cached counts as free."""
    group = tmp_path / "sys/fs/cgroup" / folder
    group.mkdir(parents=True)
    own = tmp_path / "sys/fs/cgroup/job_7/step_0/task_0"
    own.mkdir(parents=True)
    (own / "memory.max").write_text("max\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"9:name=systemd:/\n{line}\n")
    (group / used).write_text("5000000\n")
    (group / "memory.stat").write_text(
        f"anon 1\n{prefix}inactive_file 900\n{prefix}active_file 30\n"
    )
    (group / limit).write_text("9000000\n")
    assert free_host_memory(tmp_path) == 4_000_930
    (group / limit).write_text("max\n" if limit == "memory.max" else "9223372036854771712\n")
    assert free_host_memory(tmp_path) > 2**27, "the host's own"


@pytest.mark.parametrize("device, expected", [("cpu", [30, 30, 30, 90]), ("cuda", [90] * 4)])
def test_ranks_of_a_host_share_its_memory_alone(monkeypatch, device, expected):
    """Four ranks, of which three are on one host; each has a GPU of its own."""
    hosts = ["a", "a", "a", "b"]
    monkeypatch.setattr(module, "gather_objects", lambda own: hosts)
    monkeypatch.setattr(module, "free_memory", lambda device: 90)
    on_host = ranks_by_host()
    assert [free_for_a_rank(torch.device(device), on_host[host]) for host in hosts] == expected


def in_a_world(rank: int, output: str, case: str) -> list[str] | str:
    from gemoe_ds.engine.groups import expert_shard

    if case == "skewed" and rank == 1:
        module.version = lambda package: "0.0.1"
    with distributed() as world:
        shard = expert_shard(2, world, trainable=case == "trainable")
        try:
            return preflight(world, Path(output), 2, groups=shard.groups)
        except ConfigError as error:
            return str(error)


def test_a_version_that_differs_on_one_rank(tmp_path):
    first, second = run_ranks(in_a_world, 2, str(tmp_path / "runs/x"), "skewed")
    assert first == second
    assert "rank 1 (host " in first and "has torch 0.0.1" in first
    assert not list(tmp_path.iterdir())


def exchanges_of_a_preflight(rank: int, output: str) -> tuple[list[str], list[list[int]]]:
    """The lines, and the ranks of every all-to-all."""
    exchanged = []
    exchange = dist.all_to_all_single

    def recorded(*of, group=None, **how):
        exchanged.append(dist.get_process_group_ranks(group))
        return exchange(*of, group=group, **how)

    dist.all_to_all_single = recorded
    return in_a_world(rank, output, "frozen"), exchanged


def test_only_ranks_that_share_experts_exchange(tmp_path):
    """Among all ranks NCCL would connect every pair, which takes minutes."""
    found = run_ranks(exchanges_of_a_preflight, 4, str(tmp_path))
    for rank, (lines, exchanged) in enumerate(found):
        assert exchanged and all(ranks == [rank // 2 * 2, rank // 2 * 2 + 1] for ranks in exchanged)
        assert [("all-to-all" in line) for line in lines] == [False, False, True]


def test_the_rate_of_an_uneven_exchange_is_that_of_its_busiest_rank(monkeypatch):
    """Of four ranks the last sends four parts to each of three others; it takes a second."""
    monkeypatch.setattr(module.dist, "get_world_size", lambda group: 4)
    monkeypatch.setattr(module.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(module, "_fastest", lambda collective, world: 1.0)
    monkeypatch.setattr(module, "gather_objects", lambda rate: [rate, 2 * rate])
    part = module._PROBE // 4 // 16
    line = module._all_to_all_rate(World(0, 4, torch.device("cpu")), None)
    assert line == f"{4 * part * 4 * 3 / 1e9:.2f} in an all-to-all"


@pytest.mark.parametrize("case, groups", [("frozen", [4, 2]), ("trainable", [4, 2, 2])])
def test_every_process_group_is_warmed_up(tmp_path, case, groups):
    (tmp_path / "runs/x").mkdir(parents=True)
    first, *others = run_ranks(in_a_world, 4, str(tmp_path / "runs/x"), case)
    assert all(other == first for other in others)
    assert "4 ranks on 1 hosts are fit" in first[0]
    rate = r"preflight: ranks .* \((\d)\): the slowest sends [\d.]+ GB/s in an all-reduce"
    assert [int(re.match(rate, line)[1]) for line in first[1:]] == groups, first
    assert not list((tmp_path / "runs/x").iterdir()), "nothing stays of the check"


def test_a_folder_that_cannot_be_written_to():
    """One that root cannot write to either."""
    first, second = run_ranks(in_a_world, 2, "/proc/1/gemoe", "frozen")
    assert first == second and "Traceback" not in first
    assert (
        first.startswith("rank 0 (host ") and "cannot write to output_dir=/proc/1/gemoe: " in first
    )
    assert "does not see" not in first, "that would be another fault"
