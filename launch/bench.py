#!/usr/bin/env python3
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, uninstalled

import torch

from gemoe_ds.errors import ConfigError, exit_on_error

with exit_on_error():
    import gemoe_ds.engine  # noqa: F401  refuses a DS_ACCELERATOR before deepspeed is imported

from gemoe_ds.analysis.bench_report import write_report
from gemoe_ds.analysis.cost_model import Layer, compare, fit, of_ours
from gemoe_ds.analysis.projection import ASSUMPTIONS, project
from gemoe_ds.analysis.provenance import provenance
from gemoe_ds.analysis.record import write_text
from gemoe_ds.bench import links, suites
from gemoe_ds.engine.distributed import distributed
from gemoe_ds.parser import Parser

REPOSITORY = Path(__file__).resolve().parent.parent
LINKS = (links.Link(), links.Link(1000), links.Link(400), links.Link(400, delay_ms=5))
LINK_TOKENS = 1024


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
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
    parser.add_argument(
        "--keep", action="store_true", help="keep the results file's rows of other suites"
    )
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # of a part under torchrun
    parser.add_argument("--trace", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_or_exit(argv)
    with exit_on_error():
        if flags.rows:
            _ranks(flags)
        else:
            _all(flags)


def _all(flags: argparse.Namespace) -> None:
    """Every suite, the expert-parallel ones in processes of their own; then the report."""
    started, origin = time.monotonic(), provenance()  # before its own results make it dirty
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = flags.out or REPOSITORY / f"results/bench_{device}.json"
    if min(flags.rounds, flags.tokens, *flags.ep) < 1:
        raise ConfigError("--rounds, --tokens and --ep are 1 at least")
    if out.suffix != ".json":
        raise ConfigError(
            f"--out {out} must end in .json; the report goes beside it as .md and .png"
        )
    rows = _kept(out, flags.suites) if flags.keep else []

    def save(more: list[dict[str, Any]]) -> None:
        """After every part, so that a part that fails takes no other along."""
        rows.extend(more)
        results = origin | {
            "device": device,
            "threads": torch.get_num_threads(),
            "dtype": flags.dtype,
            "seconds": round(time.monotonic() - started),
            "rows": rows,
        }
        cost = cost_section(rows, flags.shape, out)
        write_text(
            out, json.dumps(results | ({"cost_model": cost} if cost else {}), indent=1) + "\n"
        )
        write_report(out)

    for ep_size in flags.ep if "ep" in flags.suites else ():
        save(_torchrun(flags, "ep", ep_size, out))
    if "timeline" in flags.suites:
        save(_torchrun(flags, "timeline", flags.ep[0], out))
    for link in LINKS if "links" in flags.suites else ():
        save(_between_hosts(flags, link))
    with distributed() as world:
        for name in flags.suites:
            if name not in ("ep", "links", "timeline"):
                print(f"== {name}", flush=True)
                save(suites.SUITES[name](_options(flags), world))
    print(out.with_suffix(".md").read_text(encoding="utf-8"), end="")


def _kept(out: Path, suites_run: list[str]) -> list[dict[str, Any]]:
    """The rows of an earlier run whose suites are not run now."""
    try:
        earlier = json.loads(out.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--keep: {out} is no benchmark result ({error!r})") from error
    return [row for row in earlier if row["suite"] not in suites_run]


def cost_section(rows: list[dict[str, Any]], shape: str, out: Path) -> dict[str, Any] | None:
    """The cost model fitted on these rows; None if they have no EP 1 and EP 2."""
    if not (of_ours(rows, "layer", 1) and of_ours(rows, "ep", 2)):
        return None
    of = suites.SHAPES[shape]
    layer = Layer(of.d_model, of.width, of.num_experts)
    machine = fit(rows, layer)
    return {
        "machine": asdict(machine),
        "compared": compare(machine, rows, layer),
        "projected": project(),
        "assumptions": ASSUMPTIONS,
        "figure": f"{out.stem}_cost.png",
    }


def _options(flags: argparse.Namespace) -> suites.Options:
    dtype = getattr(torch, flags.dtype)
    return suites.Options(flags.shape, flags.tokens, dtype, flags.rounds, flags.trace)


def _torchrun(
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
        if subprocess.run(command, env=_environment(ep_size)).returncode:
            raise ConfigError(f"{suite} on {ep_size} ranks failed; its output stands above")
        found: list[dict[str, Any]] = json.loads(rows.read_text())
    return found


def _between_hosts(flags: argparse.Namespace, link: links.Link) -> list[dict[str, Any]]:
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
        str(Path(__file__).resolve()),
        *("--suites", suite, "--rows", str(rows), "--rounds", str(flags.rounds)),
        *("--tokens", str(tokens), "--dtype", flags.dtype, "--shape", flags.shape),
    ]


def _environment(ranks: int) -> dict[str, str]:
    """The cores of the machine shared out."""
    cores = len(os.sched_getaffinity(0))
    return os.environ | {"OMP_NUM_THREADS": str(max(1, cores // ranks))}


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
