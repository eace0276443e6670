"""Time the MoE layer against its peers on this machine: results/bench_DEVICE.json, .md and .png.

One command on any device; it starts the expert-parallel parts with torchrun by itself. Every
configuration is checked against a plain float32 computation before it is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, uninstalled

import torch

from gemoe_ds.analysis.bench_report import write_report
from gemoe_ds.analysis.provenance import provenance
from gemoe_ds.analysis.record import write_text
from gemoe_ds.bench import suites
from gemoe_ds.engine.distributed import distributed
from gemoe_ds.errors import ConfigError, exit_on_error

REPOSITORY = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    names = list(suites.SUITES)
    parser.add_argument(
        "--suites", nargs="+", choices=names, default=names, metavar="SUITE", help=", ".join(names)
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds a group (default 7)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a rank (default 4096)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--shape", choices=list(suites.SHAPES), default="olmoe")
    parser.add_argument("--ep", type=int, nargs="+", default=[2, 4], help="EP sizes (default 2 4)")
    parser.add_argument("--out", type=Path, help="results file (default results/bench_DEVICE.json)")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # of a part under torchrun
    flags = parser.parse_args(argv)
    with exit_on_error():
        if flags.rows:
            _ranks(flags)
        else:
            _all(flags)


def _all(flags: argparse.Namespace) -> None:
    """Every suite, the expert-parallel ones in processes of their own; then the report."""
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = flags.out or REPOSITORY / f"results/bench_{device}.json"
    if out.suffix != ".json":
        raise ConfigError(
            f"--out {out} must end in .json; the report goes beside it as .md and .png"
        )
    rows: list[dict[str, Any]] = []
    for name in flags.suites:
        if name in suites.RANKED:
            for ep_size in flags.ep:
                rows += _torchrun(flags, name, ep_size, device)
    here = [name for name in flags.suites if name not in suites.RANKED]
    if here:
        with distributed() as world:
            for name in here:
                print(f"== {name}", flush=True)
                rows += suites.SUITES[name](_options(flags), world)
    results = provenance() | {
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": flags.dtype,
        "seconds": round(time.monotonic() - started),
        "rows": rows,
    }
    write_text(out, json.dumps(results, indent=1) + "\n")
    print(write_report(out), end="")


def _options(flags: argparse.Namespace) -> suites.Options:
    dtype = getattr(torch, flags.dtype)
    return suites.Options(flags.shape, flags.tokens, dtype, flags.rounds)


def _torchrun(
    flags: argparse.Namespace, suite: str, ep_size: int, device: str
) -> list[dict[str, Any]]:
    if device == "cuda" and torch.cuda.device_count() < ep_size:
        print(f"== {suite}, EP {ep_size}: not run, {torch.cuda.device_count()} GPU(s)", flush=True)
        return []
    print(f"== {suite}, EP {ep_size}", flush=True)
    cores = len(os.sched_getaffinity(0))
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // ep_size))}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(ep_size), str(Path(__file__).resolve())),
            *("--suites", suite, "--rows", str(rows), "--rounds", str(flags.rounds)),
            *("--tokens", str(flags.tokens), "--dtype", flags.dtype, "--shape", flags.shape),
        ]
        if subprocess.run(command, env=environment).returncode:
            raise ConfigError(f"{suite} on {ep_size} ranks failed; its output stands above")
        found: list[dict[str, Any]] = json.loads(rows.read_text())
    return found


def _ranks(flags: argparse.Namespace) -> None:
    """A part under torchrun: every rank runs it, the first one writes its rows."""
    with distributed() as world:
        rows = []
        for name in flags.suites:
            rows += suites.SUITES[name](_options(flags), world)
        if world.is_first:
            flags.rows.write_text(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
