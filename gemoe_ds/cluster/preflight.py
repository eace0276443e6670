"""What would end a run hours later is found before its first step, on every rank.

Each rank fills in a `Passport`; all are compared. A fault is one line: rank, host, value, way out.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import deepspeed.comm as dist
import psutil
import torch

from gemoe_ds.engine.distributed import World, gather_objects
from gemoe_ds.errors import ConfigError
from gemoe_ds.position import HERE

PACKAGES = ("gemoe-ds", "torch", "deepspeed", "transformers")
FREE_DISK = 2 * 2**30  # bytes
_VISIBLE_SECONDS = 10.0  # for a shared file system to show a new file
_PROBE = 2**22  # bytes of the probes of bandwidth


@dataclass(frozen=True)
class Passport:
    """What a rank says of itself."""

    host: str
    device: str  # unique on its host
    versions: dict[str, str]
    sees_output: bool
    free_disk: int
    free_memory: int  # of its device; on a CPU its part of the host's

    @classmethod
    def of(cls, world: World, output: Path, sees_output: bool) -> Passport:
        existing = next(p for p in (output, *output.absolute().parents) if p.exists())
        if world.device.type == "cuda":
            device = str(torch.cuda.get_device_properties(world.device).uuid)
            memory = torch.cuda.mem_get_info(world.device)[0]
        else:
            device = f"process {os.getpid()}"
            memory = psutil.virtual_memory().available
        versions = {"python": platform.python_version()} | {p: version(p) for p in PACKAGES}
        return cls(
            socket.gethostname(),
            device,
            versions,
            sees_output,
            shutil.disk_usage(existing).free,
            memory,
        )


def preflight(world: World, output: Path, ep_size: int, needed: int | None = None) -> list[str]:
    """Check all ranks; the lines to print. Collective; raises ConfigError on all ranks.

    `needed`: bytes of memory of a rank, if they were estimated.
    """
    HERE.enter("preflight")
    passport = Passport.of(world, output, _sees_what_the_first_writes(world, output))
    passports = gather_objects(passport)
    found = list(faults(passports, output, needed, on_gpu=world.device.type == "cuda"))
    if found:
        raise ConfigError("; ".join(found))
    lines = list(remarks(passports, ep_size))
    if world.size > 1:
        lines += _bandwidth(world)
    return lines


def faults(
    passports: list[Passport], output: Path, needed: int | None, *, on_gpu: bool
) -> Iterator[str]:
    """One line each; no fault, no line."""
    first = passports[0]
    for rank, theirs in enumerate(passports):
        for package, wanted in first.versions.items():
            have = theirs.versions.get(package)
            if have != wanted:
                yield (
                    f"{_who(rank, theirs)} has {package} {have}, rank 0 (host {first.host}) has "
                    f"{wanted}; install the same on all hosts"
                )
        if not theirs.sees_output:
            yield (
                f"{_who(rank, theirs)} does not see what rank 0 (host {first.host}) writes to "
                f"output_dir={output}; put it on a file system that all hosts share"
            )
        if theirs.free_disk < FREE_DISK:
            yield (
                f"{_who(rank, theirs)} has {theirs.free_disk / 2**30:.1f} GiB free for output_dir="
                f"{output}, {FREE_DISK / 2**30:.0f} are wanted; free some, or choose another folder"
            )
    holders: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, theirs in enumerate(passports):
        holders[theirs.host, theirs.device].append(rank)
    for (host, device), ranks in holders.items():
        if on_gpu and len(ranks) > 1:
            yield (
                f"ranks {', '.join(map(str, ranks))} (host {host}) share the GPU {device}; start "
                "one rank a GPU, and let each see its own (CUDA_VISIBLE_DEVICES)"
            )
    if needed is not None:
        on_host = Counter(p.host for p in passports)
        for rank, theirs in enumerate(passports):
            free = theirs.free_memory // (1 if on_gpu else on_host[theirs.host])
            if needed > free:
                yield (
                    f"{_who(rank, theirs)} has {free / 2**30:.1f} GiB of memory free, "
                    f"{needed / 2**30:.1f} are estimated; lower train.micro_batch, set "
                    "model.recompute=true, or raise parallel.ep_size"
                )


def remarks(passports: list[Passport], ep_size: int) -> Iterator[str]:
    """What is slow, not wrong."""
    hosts = list(dict.fromkeys(p.host for p in passports))
    yield f"preflight: {len(passports)} ranks on {len(hosts)} hosts are fit"
    smallest = min(Counter(p.host for p in passports).values())
    across = [
        first
        for first in range(0, len(passports), ep_size)
        if len({p.host for p in passports[first : first + ep_size]}) > 1
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


def _who(rank: int, passport: Passport) -> str:
    return f"rank {rank} (host {passport.host})"


def _sees_what_the_first_writes(world: World, output: Path) -> bool:
    """Beside the output folder, which is not there before the run."""
    existing = next(p for p in output.absolute().parents if p.exists())
    token = gather_objects(secrets.token_hex(8))[0]
    path = existing / f".{output.name}-{token}"
    if world.is_first:
        with suppress(OSError):  # it does not see it either
            path.write_text(token)
    gather_objects(None)
    end = time.monotonic() + _VISIBLE_SECONDS
    while not (seen := path.exists()) and time.monotonic() < end:
        time.sleep(0.2)
    gather_objects(None)
    if world.is_first:
        path.unlink(missing_ok=True)
    return seen


def _bandwidth(world: World) -> list[str]:
    """Warms the group up; GB/s that a rank sends in an all-reduce and an uneven all-to-all."""
    tensor = torch.ones(_PROBE // 4, device=world.device)
    # rank r sends r + 1 parts to everyone; what it gets is uneven
    part = _PROBE // 4 // world.size**2
    sent = torch.ones(world.size * part * (world.rank + 1), device=world.device)
    splits_out = [part * (rank + 1) for rank in range(world.size)]
    got = torch.empty(sum(splits_out), device=world.device)
    splits_in = [part * (world.rank + 1)] * world.size
    share = 2 * (world.size - 1) / world.size
    away = sent.numel() * 4 * (world.size - 1) / world.size

    def all_to_all() -> None:
        dist.all_to_all_single(got, sent, splits_out, splits_in)

    first = _fastest(lambda: dist.all_reduce(tensor), world)
    second = _fastest(all_to_all, world)
    rates = gather_objects((share * _PROBE / first, away / second))
    slowest = [min(column) / 1e9 for column in zip(*rates, strict=True)]
    return [
        f"preflight: slowest rank sends {slowest[0]:.2f} GB/s in an all-reduce, "
        f"{slowest[1]:.2f} in an all-to-all"
    ]


def _fastest(collective, world: World) -> float:
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
