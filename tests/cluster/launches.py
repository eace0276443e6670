"""Ranks of launch/train.py as processes that a test signals, stops and kills one by one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers import Forked, free_port, repository
from tests.train.resuming import make_config

TRAIN = "launch/train.py"


STEPS = 40


HARM = """
import os, sys, time
sys.path.insert(0, os.getcwd())
import gemoe_ds.train.trainer as trainer
step = trainer.Trainer.train_step
def harmed(self, number, batches, *, collect):
    if {when} and self.world.rank == {victim}:
        {harm}
    return step(self, number, batches, collect=collect)
trainer.Trainer.train_step = harmed
from gemoe_ds.cli.train import main
main(sys.argv[1:])
"""


def harmed(script: Path, harm: str, *, when: str, victim: int = 1) -> Path:
    """launch/train.py with the statement `harm` before each step of rank `victim` that is `when`,
    an expression of the step's `number`."""
    script.write_text(HARM.format(harm=harm, when=when, victim=victim))
    return script


class Ranks:
    """`num_ranks` processes, started as srun does: no launcher that ends the rest.

    Forked, which saves five seconds of a core each; `make faults` (GEMOE_FORK=0) has real ones.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Path,
        num_ranks: int,
        *overrides: str,
        script: str | Path = TRAIN,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port, environment = free_port(), os.environ | {"DS_ACCELERATOR": "cpu"}
        self.logs = [folder / f"rank-{rank}.log" for rank in range(num_ranks)]
        self.processes: list[Forked | subprocess.Popen] = []
        for rank, log in enumerate(self.logs):
            log.touch()
            env = environment | {
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            self.processes.append(_start([str(script), str(recipe), *overrides], log, env))

    def signal(self, rank: int, number: signal.Signals) -> None:
        self.processes[rank].send_signal(number)

    def codes(self, timeout: float = 120) -> list[int]:
        """Exit codes of all, within `timeout` seconds."""
        end = time.monotonic() + timeout
        return [p.wait(max(end - time.monotonic(), 0.01)) for p in self.processes]

    def log(self, rank: int) -> str:
        return self.logs[rank].read_text(errors="replace")

    def wait_until(self, condition: Callable[[], bool], timeout: float = 90) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, "\n".join(map(self.log, range(len(self.logs))))[-4000:]
            ended = [p.poll() for p in self.processes]
            assert ended == [None] * len(ended), (ended, self.log(0)[-3000:])
            time.sleep(0.02)

    def wait_for_step(self, output: Path, step: int) -> None:
        self.wait_until(lambda: any(line["step"] >= step for line in metrics(output)))


def _start(words: list[str], log: Path, env: dict[str, str]) -> Forked | subprocess.Popen:
    if os.environ.get("GEMOE_FORK") != "0":
        return Forked(words, log, log, env)
    with open(log, "w") as out:
        command = [sys.executable, *words]
        return subprocess.Popen(command, cwd=repository(), env=env, stdout=out, stderr=out)


@contextmanager
def ranks(
    folder: Path, recipe: Path, num_ranks: int, *overrides: str, script: str | Path = TRAIN
) -> Iterator[Ranks]:
    started = Ranks(folder, recipe, num_ranks, *overrides, script=script)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()  # SIGKILL ends a stopped process too
            process.wait()


def metrics(output: Path) -> list[dict]:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_recipe(setting, folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    changes = {
        "train": {"steps": STEPS, "micro_batch_size": 1, "global_batch_size": 2},
        "checkpoint": {"every": 0, "keep": 50},
        "monitor__sample_log": True,
        "resume": "auto",
    } | changes
    config = make_config(setting, folder / "run", **changes)
    (folder / "recipe.yaml").write_text(config.dump_yaml())
    return folder / "recipe.yaml", folder / "run"
