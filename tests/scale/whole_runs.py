"""Whole runs on forked ranks of gloo: train, save, and resume on another number of ranks."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from tests.helpers import repository, run_ranks
from tests.scale.counting import Counter, open_files
from tests.train.resuming import make_config

STEPS = 4
STARTS = ("rendezvous", "watch", "prepare", "load", "engine")  # `prepare` has the preflight


def config_of(
    setting: dict[str, Path],
    output: Path,
    *,
    global_batch_size: int,
    zero: int,
    steps: int = STEPS,
    resumes: bool = False,
) -> Any:
    batch = {"micro_batch_size": 1, "global_batch_size": global_batch_size}
    return make_config(
        setting,
        output,
        train={"steps": steps} | batch,
        checkpoint__every=100,
        monitor__every=2,
        parallel__ep_size=2,
        deepspeed=str(repository() / f"ds_configs/zero{zero}.json"),
        resume="auto" if resumes else "none",
    )


def measured(rank: int, setting: dict[str, Path], options: dict[str, Any]) -> dict[str, Any]:
    """One rank of a run: CPU seconds, collectives, open files."""
    import gemoe_ds.train.run as run
    from gemoe_ds.checkpoint.writer import Saver
    from gemoe_ds.cluster.watchdog import Watch
    from gemoe_ds.engine import world
    from gemoe_ds.train import prepare
    from gemoe_ds.train.trainer import Trainer

    counter = Counter()
    counter.time(world, "init_process_group", "rendezvous")
    counter.time(Watch, "__init__", "watch")
    counter.time(prepare, "preflight", "preflight")
    counter.time(run, "prepare", "prepare")
    counter.time(run, "build", "load")
    counter.time(run, "resume", "engine")
    counter.time(Trainer, "train_step", "step", "step")
    counter.time(Saver, "save", "save", "save")
    counter.time(Saver, "wait", "save", "save")
    files = []
    whole = Trainer.run

    def counted(self: Trainer) -> None:
        whole(self)
        files.append(open_files())

    Trainer.run = counted  # type: ignore[method-assign]
    began, wall = time.process_time(), time.monotonic()
    run.train(config_of(setting, **options))
    return counter.found() | {
        "cpu_s": time.process_time() - began,
        "wall_s": time.monotonic() - wall,
        "open": files[0][0],
        "sockets": files[0][1],
    }


def train_and_resume(
    setting: dict[str, Path], output: Path, ranks: int, then: int, *, zero: int
) -> list[dict[str, Any]]:
    """A row of the run, and one of its resumption on `then` ranks."""
    rows = []
    options = {"output": output, "global_batch_size": math.lcm(ranks, then), "zero": zero}
    for number, resumes in ((ranks, False), (then, True)):
        options |= {"steps": STEPS * (1 + resumes), "resumes": resumes}
        began = time.monotonic()
        found = run_ranks(measured, number, setting, options, timeout=900)
        row = {"ranks": number, "micro_batches": options["global_batch_size"] // number}
        row |= {"zero": zero, "resumes": resumes, "wall_s": round(time.monotonic() - began, 1)}
        rows.append(row | _of_ranks(found))
    return rows


def _of_ranks(found: list[dict[str, Any]]) -> dict[str, Any]:
    first, last = found[0], found[-1]
    return {
        "cpu_s_a_rank": round(sum(rank["cpu_s"] for rank in found) / len(found), 3),
        "first": _seconds(first),
        "last": _seconds(last),
        "calls": last["calls"],
        "sockets_of_first": first["sockets"],
        "sockets_of_last": last["sockets"],
        "open_of_first": first["open"],
    }


def _seconds(rank: dict[str, Any]) -> dict[str, float]:
    """CPU seconds by part; `start` is all that comes before the first step."""
    parts = rank["cpu"] | {"step": rank["step"], "run": rank["cpu_s"]}
    parts["start"] = sum(parts[name] for name in STARTS)
    return {name: round(value, 4) for name, value in parts.items()}
