"""What would end a run hours later is found before its first step, on every rank.

Each rank fills in a `RankReport`; all are compared. An error is one line: rank, host, value, way
out.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from gemoe_ds.engine.groups import SHARING_EXPERTS
from gemoe_ds.engine.world import World, gather_objects, waiting
from gemoe_ds.errors import ConfigError
from gemoe_ds.progress import PROGRESS

PACKAGES = ("gemoe-ds", "torch", "deepspeed", "transformers")
FREE_DISK = 16 * 2**20  # bytes, beside checkpoints: metrics and so on
_VISIBLE_SECONDS = 10.0  # for a shared file system to show a new file
_NAMED = 3  # ranks beside the first that have the same fault
_PROBE = 2**22  # bytes of the probes of bandwidth


@dataclass(frozen=True)
class RankReport:
    """What a rank says of itself."""

    host: str
    device: str  # unique on its host
    versions: dict[str, str]
    cannot_write: str  # why not, to output_dir; empty if it can
    sees_output: bool
    free_disk: int
    free_memory: int  # of its device; on a CPU its host's

    @classmethod
    def of(cls, world: World, output: Path) -> RankReport:
        existing = _existing(output)
        cannot_write, sees_output = _exchange_files(world, existing)
        if world.device.type == "cuda":
            device = str(torch.cuda.get_device_properties(world.device).uuid)
        else:
            device = f"process {os.getpid()}"
        versions = {"python": platform.python_version()} | {p: version(p) for p in PACKAGES}
        return cls(
            socket.gethostname(),
            device,
            versions,
            cannot_write,
            sees_output,
            shutil.disk_usage(existing).free,
            free_memory(world.device),
        )


def preflight(
    world: World,
    output: Path,
    ep_size: int,
    needed: int | None = None,
    groups: Mapping[str, Any] | None = None,
    on_disk: int = 0,
) -> list[str]:
    """Check all ranks; the lines to print. Collective; raises ConfigError on all ranks.

    `needed`: bytes of memory that a rank will need beside what it has, if they were estimated.
    `groups`: process groups beside that of all ranks, by name, to be warmed up too, each with what
    it does in training. `on_disk`:
    bytes of the checkpoints that will be kept.
    """
    PROGRESS.enter("preflight")
    reports = gather_objects(RankReport.of(world, output))
    on_gpu = world.device.type == "cuda"
    found = list(errors(reports, output, needed, on_disk + FREE_DISK, on_gpu=on_gpu))
    if found:
        raise ConfigError("; ".join(found))
    lines = list(warnings(reports, ep_size))
    if world.size > 1:
        every: dict[str, Any] = {"of this run": None} | dict(groups or {})
        for name, group in every.items():
            lines.append(_all_reduce_rate(world, name, group))
            if name == SHARING_EXPERTS:
                lines[-1] += f", {_all_to_all_rate(world, group)}"
    return lines


def errors(
    reports: list[RankReport], output: Path, needed: int | None, on_disk: int, *, on_gpu: bool
) -> Iterator[str]:
    """One line each, however many ranks have it; no fault, no line."""
    said: dict[str, list[int]] = defaultdict(list)
    on_host = Counter(p.host for p in reports)
    for rank, theirs in enumerate(reports):
        for fault in _unfit(theirs, reports[0], output, on_disk):
            said[fault].append(rank)
        free = theirs.free_memory // (1 if on_gpu else on_host[theirs.host])
        if needed is not None and needed > free:
            fault = (
                f"has {_gib(free)} of memory free, {_gib(needed)} more are estimated; lower "
                "train.micro_batch_size, set model.activation_checkpointing=true, or raise "
                "parallel.ep_size"
            )
            said[fault].append(rank)
    for fault, ranks in said.items():
        first, *more = [f"rank {rank} (host {reports[rank].host})" for rank in ranks]
        others = ", ".join(more) if len(more) <= _NAMED else f"{len(more)} other ranks"
        yield f"{first} {fault}" + (f" (the same on {others})" if more else "")
    holders: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, theirs in enumerate(reports):
        holders[theirs.host, theirs.device].append(rank)
    for (host, device), ranks in holders.items():
        if on_gpu and len(ranks) > 1:
            yield (
                f"ranks {', '.join(map(str, ranks))} (host {host}) share the GPU {device}; start "
                "one rank a GPU, and let each see its own (CUDA_VISIBLE_DEVICES)"
            )


def _unfit(theirs: RankReport, first: RankReport, output: Path, on_disk: int) -> Iterator[str]:
    """What is wrong with one rank's host and disk."""
    for package, wanted in first.versions.items():
        have = theirs.versions.get(package)
        if have != wanted:
            yield (
                f"has {package} {have}, rank 0 (host {first.host}) has {wanted}; install the same "
                "on all hosts"
            )
    if theirs.cannot_write:
        yield (
            f"cannot write to output_dir={output}: {theirs.cannot_write}; choose another folder, "
            "or have this one made writable"
        )
    elif not theirs.sees_output and not first.cannot_write:
        yield (
            f"does not see what rank 0 (host {first.host}) writes to output_dir={output}; put it "
            "on a file system that all hosts share"
        )
    if theirs.free_disk < on_disk:
        yield (
            f"has {_gib(theirs.free_disk)} free for output_dir={output}, and {_gib(on_disk)} may "
            "be written; free some, lower checkpoint.keep, or choose another folder"
        )


def warnings(reports: list[RankReport], ep_size: int) -> Iterator[str]:
    """What is slow, not wrong."""
    hosts = list(dict.fromkeys(p.host for p in reports))
    yield f"preflight: {len(reports)} ranks on {len(hosts)} hosts are fit"
    smallest = min(Counter(p.host for p in reports).values())
    across = [
        first
        for first in range(0, len(reports), ep_size)
        if len({p.host for p in reports[first : first + ep_size]}) > 1
    ]
    if across and ep_size <= smallest:
        yield (
            f"slow: experts of ranks {across[0]} to {across[0] + ep_size - 1} are on several "
            f"hosts, though {ep_size} ranks fit on one; number the ranks host by host"
        )
    elif across:
        yield (
            f"slow: parallel.ep_size={ep_size} exceeds the {smallest} ranks of a host: every layer "
            "crosses the network"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def free_memory(device: torch.device) -> int:
    """Bytes that nobody has: of a GPU, or of this process's host."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_memory()


def ranks_by_host() -> Counter[str]:
    """How many ranks each host has, by its name. Collective."""
    return Counter(gather_objects(socket.gethostname()))


def free_for_a_rank(device: torch.device, ranks_of_host: int) -> int:
    """Bytes of its own GPU, or its part of what the host has for all of its ranks."""
    return free_memory(device) // (1 if device.type == "cuda" else ranks_of_host)


def free_host_memory(root: Path = Path("/")) -> int:
    """Bytes that this host has left, or a control group that this process is in: SLURM holds a
    job to its `--mem` by one above the process's own."""
    free = psutil.virtual_memory().available
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names = ("memory.max", "memory.current", "inactive_file", "active_file")
        mount = root / "sys/fs/cgroup"
        if controllers:  # of the first version
            names = (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
                "total_active_file",
            )
            mount /= "memory"
        own = Path(path.strip("/"))
        for group in (own, *own.parents):
            with suppress(OSError, ValueError):  # no limit, or not to be seen from here
                free = min(free, _free_of_group(mount / group, names))
    return free


def _free_of_group(group: Path, names: Sequence[str]) -> int:
    """Its limit, without what is used; files of that are cached are given back when asked for."""
    limit, used = (int((group / name).read_text()) for name in names[:2])
    words = (group / "memory.stat").read_text().split()
    of = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    return max(limit - used + sum(of.get(name, 0) for name in names[2:]), 0)


def _existing(output: Path) -> Path:
    """The folder itself, or what is there of the way to it."""
    return next(p for p in (output, *output.absolute().parents) if p.exists())


def _exchange_files(world: World, folder: Path) -> tuple[str, bool]:
    """Why this rank cannot write there, and whether it sees what the first one writes."""
    token = gather_objects(secrets.token_hex(8))[0]
    own, firsts = (folder / f".preflight-{token}-{rank}" for rank in (world.rank, 0))
    reason = ""
    try:
        own.write_text(token)
    except OSError as error:
        reason = error.strerror or str(error)
    is_written = not gather_objects(reason)[0]
    end = time.monotonic() + _VISIBLE_SECONDS
    while not (seen := firsts.exists()) and is_written and time.monotonic() < end:
        time.sleep(0.2)
    gather_objects(None)
    with suppress(OSError):
        own.unlink(missing_ok=True)
    return reason, seen


def _all_reduce_rate(world: World, name: str, group: Any) -> str:
    """Warms a group up; GB/s that a rank sends in an all-reduce."""
    tensor = torch.ones(_PROBE // 4, device=world.device)
    size = dist.get_world_size(group)

    def all_reduce() -> None:
        with waiting(f"all_reduce of the ranks {name}"):
            dist.all_reduce(tensor, group=group)

    rate = _slowest(2 * (size - 1) / size * _PROBE / _fastest(all_reduce, world))
    return f"preflight: ranks {name} ({size}): the slowest sends {rate:.2f} GB/s in an all-reduce"


def _all_to_all_rate(world: World, group: Any) -> str:
    """GB/s of the busiest rank in an uneven all-to-all, of the ranks that share experts.

    Only they ever exchange so: among all ranks NCCL would connect every pair.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    # rank r sends r + 1 parts to everyone; what it gets is uneven
    part = max(_PROBE // 4 // size**2, 1)
    sent = torch.ones(size * part * (rank + 1), device=world.device)
    splits_out = [part * (other + 1) for other in range(size)]
    got = torch.empty(sum(splits_out), device=world.device)
    splits_in = [part * (rank + 1)] * size
    most = 4 * part * size * (size - 1)  # bytes that the last rank sends away: it ends last

    def all_to_all() -> None:
        with waiting("all_to_all of the ranks sharing experts"):
            dist.all_to_all_single(got, sent, splits_out, splits_in, group=group)

    return f"{_slowest(most / _fastest(all_to_all, world)):.2f} in an all-to-all"


def _slowest(rate: float) -> float:
    """The smallest of all ranks' rates, in units of a billion. Collective."""
    return min(gather_objects(rate)) / 1e9


def _fastest(collective: Callable[[], None], world: World) -> float:
    """Seconds of the fastest of three, after one to warm up."""
    seconds = []
    for _ in range(4):
        gather_objects(None)
        began = time.perf_counter()
        collective()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        seconds.append(time.perf_counter() - began)
    return max(min(seconds[1:]), 1e-9)
