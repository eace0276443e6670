"""The parts of the benchmark that need ranks: processes on this host, or on two with a link."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import CHECKOUT, links
from gemoe_ds.errors import ConfigError

LINK_TOKENS = 1024


def on_ranks(
    flags: argparse.Namespace, suite: str, ep_size: int, out: Path
) -> list[dict[str, Any]]:
    """A suite on so many ranks of this host."""
    if torch.cuda.is_available() and torch.cuda.device_count() < ep_size:
        print(f"== {suite}, EP {ep_size}: not run, too few GPUs", flush=True)
        return []
    print(f"== {suite}, EP {ep_size}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        # ranks of one host share its memory, of which AutoEP takes 2.4 GB each at 4096 tokens
        crowded = ep_size > 2 and not torch.cuda.is_available()
        part = _part(flags, suite, rows, flags.tokens // 2 if crowded else flags.tokens)
        trace = out.with_name(f"{out.stem}_trace.json.gz").absolute()
        command = [*launcher, "--nproc_per_node", str(ep_size), *part, "--trace", str(trace)]
        if subprocess.run(command, cwd=CHECKOUT, env=_environment(ep_size)).returncode:
            raise ConfigError(f"{suite} on {ep_size} ranks failed; its output stands above")
        found: list[dict[str, Any]] = json.loads(rows.read_text())
    return found


def between_hosts(flags: argparse.Namespace, link: links.Link) -> list[dict[str, Any]]:
    """The `links` suite on one rank of each of two hosts with that link between them."""
    reason = links.why_not(link)
    if reason:
        print(f"== links, {link}: not run, {reason}", flush=True)
        return []
    print(f"== links, {link}", flush=True)
    with tempfile.TemporaryDirectory() as folder, links.two_hosts(link) as hosts:
        rows = Path(folder) / "rows.json"
        address = {"MASTER_ADDR": links.ADDRESSES[0], "MASTER_PORT": "29555"}  # of the host alone
        address |= {"GLOO_SOCKET_IFNAME": links.INTERFACE, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        ranks = [
            subprocess.Popen(
                [*prefix, sys.executable, *_part(flags, "links", rows, LINK_TOKENS)],
                cwd=CHECKOUT,
                env=_environment(2) | address | {"RANK": str(rank)},
            )
            for rank, prefix in enumerate(hosts)
        ]
        if any([rank.wait() for rank in ranks]):
            raise ConfigError(f"links, {link}, failed; its output stands above")
        found: list[dict[str, Any]] = json.loads(rows.read_text())
    of = {"suite": "links", "link": str(link)}
    return [row | of for row in found]


def _part(flags: argparse.Namespace, suite: str, rows: Path, tokens: int) -> list[str]:
    return [
        *("-m", "benchmarks", "--suites", suite, "--rows", str(rows)),
        *("--rounds", str(flags.rounds), "--tokens", str(tokens)),
        *("--dtype", flags.dtype, "--shape", flags.shape),
    ]


def _environment(ranks: int) -> dict[str, str]:
    """The cores of the machine shared out."""
    cores = len(os.sched_getaffinity(0))
    return os.environ | {"OMP_NUM_THREADS": str(max(1, cores // ranks))}
