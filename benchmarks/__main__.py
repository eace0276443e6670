"""Time the MoE layer against its peers on this machine: results/bench_DEVICE.json, .md and .png.

One command on any device; it starts the expert-parallel parts with torchrun by itself. Every
configuration is checked against a plain float32 computation before it is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gemoe_ds.errors import ConfigError, exit_on_error

with exit_on_error():
    import gemoe_ds.engine  # noqa: F401  refuses a DS_ACCELERATOR before deepspeed is imported

from benchmarks import CHECKOUT, links, suites, timing
from benchmarks.processes import between_hosts, on_ranks
from benchmarks.projection import cost_section
from benchmarks.report import write_report
from gemoe_ds.analysis.provenance import provenance
from gemoe_ds.engine.world import distributed
from gemoe_ds.files import write_text
from gemoe_ds.parser import Parser

LINKS = (links.Link(), links.Link(1000), links.Link(400), links.Link(400, delay_ms=5))


def main(argv: list[str]) -> None:
    parser = Parser("python -m benchmarks", description=__doc__)
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
    parser.add_argument(
        "--cpu-seconds",
        action="store_true",
        help="time what one thread computes, on a CPU that others use too",
    )
    parser.add_argument(
        "--modes", nargs="+", choices=suites.MODES, default=suites.MODES, help="of `layer`: all"
    )
    parser.add_argument(
        "--mean-ks", nargs="+", type=float, default=suites.SWEEP, help="of `layer`: 1 to 8, and 5.1"
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
    out = flags.out or CHECKOUT / f"results/bench_{device}.json"
    if min(flags.rounds, flags.tokens, *flags.ep) < 1:
        raise ConfigError("--rounds, --tokens and --ep are 1 at least")
    if out.suffix != ".json":
        raise ConfigError(
            f"--out {out} must end in .json; the report goes beside it as .md and .png"
        )
    largest = suites.SHAPES[flags.shape].top_k
    if largest not in flags.mean_ks or min(flags.mean_ks) < 1:
        raise ConfigError(
            f"--mean-ks {' '.join(map(str, flags.mean_ks))}: 1 at least, and {largest} among them, "
            "with which the others are compared"
        )
    if flags.cpu_seconds:
        _use_cpu_seconds(flags, device)
    rows = _kept(out, flags.suites) if flags.keep else []
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}; choose another file") from error

    def save(more: list[dict[str, Any]]) -> None:
        """After every part, so that a part that fails takes no other along."""
        rows.extend(more)
        results = origin | {
            "device": device,
            "threads": torch.get_num_threads(),
            "clock": "cpu" if flags.cpu_seconds else "wall",
            "dtype": flags.dtype,
            "seconds": round(time.monotonic() - started),
            "rows": rows,
        }
        cost = cost_section(rows, suites.SHAPES[flags.shape], out)
        write_text(
            out, json.dumps(results | ({"cost_model": cost} if cost else {}), indent=1) + "\n"
        )
        write_report(out)

    timing.keep_kernels()  # in the processes that are started here, too
    for ep_size in flags.ep if "ep" in flags.suites else ():
        save(on_ranks(flags, "ep", ep_size, out))
    if "timeline" in flags.suites:
        save(on_ranks(flags, "timeline", flags.ep[0], out))
    for link in LINKS if "links" in flags.suites else ():
        save(between_hosts(flags, link))
    with distributed() as world:
        for name in flags.suites:
            if name not in ("ep", "links", "timeline"):
                print(f"== {name}", flush=True)
                save(suites.SUITES[name](_options(flags), world))
    print(out.with_suffix(".md").read_text(encoding="utf-8"), end="")


def _use_cpu_seconds(flags: argparse.Namespace, device: str) -> None:
    waiting = sorted({"ep", "links", "timeline"} & set(flags.suites))
    if device != "cpu" or waiting:
        raise ConfigError(
            f"--cpu-seconds: {', '.join(waiting) or device} is about waiting, which takes none; "
            "leave it out, or give --suites of one process on a CPU"
        )
    timing.use_cpu_seconds()


def _kept(out: Path, suites_run: list[str]) -> list[dict[str, Any]]:
    """The rows of an earlier run whose suites are not run now."""
    try:
        earlier = json.loads(out.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--keep: {out} is no benchmark result ({error!r})") from error
    return [row for row in earlier if row["suite"] not in suites_run]


def _options(flags: argparse.Namespace) -> suites.Options:
    dtype = getattr(torch, flags.dtype)
    of_layer = tuple(flags.modes), tuple(flags.mean_ks)
    return suites.Options(flags.shape, flags.tokens, dtype, flags.rounds, flags.trace, *of_layer)


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
