"""The faults that a run must survive, each with the tests that plant it: results/faults.json.

`python -m tests.cluster.faults` (`make faults`) runs them all and writes what held, and how long it
took to detect and to recover. `python -m tests.cluster.faults --signals 50` also cuts one run at
that many random moments by a random signal to a random rank.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from gemoe_ds.analysis.provenance import provenance
from gemoe_ds.errors import REQUEUE
from tests.cluster.launches import metrics, ranks, write_recipe
from tests.helpers import repository
from tests.train.resuming import write_setting
from tests.train.sample_logs import read_sample_log

RESULTS = repository() / "results/faults.json"
WATCH, STOP = "tests/cluster/test_watchdog.py", "tests/cluster/test_signals.py"
DISK, TORCHRUN = "tests/cluster/test_disk.py", "tests/cluster/test_torchrun.py"
RESUME, MANIFEST = "tests/train/test_resume.py", "tests/checkpoint/test_manifest.py"
WRITER = "tests/checkpoint/test_writer.py"


@dataclass
class Fault:
    number: int
    what: str
    expected: str
    tests: list[str] = field(default_factory=list)  # none: needs a GPU, not run


FAULTS = [
    Fault(
        1,
        "SIGKILL of a rank, in a step and in an all-to-all",
        "the others name it and end with 3; the run goes on from its newest checkpoint",
        [
            f"{WATCH}::test_a_killed_rank_is_named_by_the_other",
            f"{WATCH}::test_killed_and_resumed",
            f"{WATCH}::test_a_rank_that_is_killed_while_evaluating_is_named",
            TORCHRUN,
        ],
    ),
    Fault(
        2,
        "SIGTERM or SIGUSR1 to one rank, while it loads, trains, waits for data, saves, evaluates",
        "all save one step and end with 75; the run goes on as if uncut",
        [STOP],
    ),
    Fault(
        3,
        "SIGSTOP of a rank; a rank that is stuck; a rank that is slow",
        "named within the bound with host, phase, step, layer, collective; slow ranks go on",
        [
            f"{WATCH}::test_a_stopped_rank_is_named_by_the_other",
            f"{WATCH}::test_a_rank_that_fails_or_is_stuck_is_named",
            f"{WATCH}::test_a_save_that_never_ends_is_named",
            f"{WATCH}::test_a_slow_rank_is_left_alone",
        ],
    ),
    Fault(
        4,
        "a Python exception on one rank",
        "its peers print it and end with the same code, before any timeout",
        [f"{WATCH}::test_a_rank_that_fails_or_is_stuck_is_named"],
    ),
    Fault(
        5,
        "kill -9 at each write of a save, and at random moments of it",
        "one valid checkpoint stays and is chosen",
        [
            f"{MANIFEST}::test_killed_at_any_write_one_valid_checkpoint_stays",
            f"{MANIFEST}::test_killed_at_any_moment_one_valid_checkpoint_stays",
        ],
    ),
    Fault(
        6,
        "a truncated, flipped, missing or swapped shard, a wrong manifest",
        "named and skipped; an older checkpoint is taken",
        [f"{MANIFEST}::test_damage_is_named_and_auto_falls_back"],
    ),
    Fault(
        7,
        "a full, read-only, too small or vanished disk (tmpfs), a write that fails on one rank",
        "all stop with the reason; older checkpoints stay; the run goes on when there is room",
        [DISK, f"{WRITER}::test_a_save_that_fails_on_one_rank_stops_all_and_harms_nothing"],
    ),
    Fault(
        8,
        "NaN or Inf in a gradient, on one rank",
        "the step is skipped on all, counted, and after so many the run saves and stops",
        ["tests/engine/test_skipped.py"],
    ),
    Fault(
        9,
        "idle experts, all tokens to one expert, k = 0 everywhere",
        "the same collectives on every rank, exact gradients",
        ["tests/engine/test_collectives.py", "tests/moe/test_all_to_all.py"],
    ),
    Fault(
        10,
        "a rank without images, or without a token",
        "the same collectives on every rank",
        ["tests/engine/test_collectives.py"],
    ),
    Fault(
        11,
        "broken and missing images",
        "dropped when data are converted, left out when they break later; listed, order kept",
        [
            "tests/data/sources/test_convert.py",
            "tests/data/sources/test_pictures.py",
            "tests/data/test_stream.py",
            "tests/train/test_bad_samples.py",
        ],
    ),
    Fault(
        12,
        "resumed with other ranks, EP size, ZeRO stage",
        "the next losses are those of the uncut run",
        [f"{RESUME}::test_a_run_goes_on_with_any_ranks_and_stages"],
    ),
    Fault(
        13,
        "resumed twice, on other numbers of ranks",
        "every step sees the samples of the uncut run",
        [f"{RESUME}::test_the_sample_log_of_a_run_cut_twice_is_the_uninterrupted_one"],
    ),
    Fault(
        14,
        "a port that is taken, a wrong interface, a missing node, version skew",
        "one line before anything is loaded",
        ["tests/cli/test_doctor.py", "tests/cluster/test_preflight.py"],
    ),
    Fault(15, "out of memory on one GPU", "all stop with a report"),
    Fault(16, "poisoned memory under grouped products", "no NaN, zero gradients"),
    Fault(
        17,
        "experts that the optimizer does not have, wrong scales of groups",
        "the start-up check or the parity test stops it",
        ["tests/engine/test_mutations.py"],
    ),
    Fault(
        18,
        "a checkpoint of an older version",
        "refused by its schema",
        [f"{MANIFEST}::test_damage_is_named_and_auto_falls_back"],
    ),
]


def run(fault: Fault) -> dict:
    """One pytest for a fault; seconds that its tests recorded, of the slowest case."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", f"--junit-xml={report}"]
        subprocess.run([*command, *fault.tests], cwd=repository(), capture_output=True)
        suite = ET.parse(report).getroot()[0]
    measured: dict[str, float] = {}
    for found in suite.iter("property"):
        if (name := found.get("name", "")) in TIMES:
            measured[name] = max(measured.get(name, 0.0), float(found.get("value", 0)))
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    held = count["tests"] > count["skipped"] and not count["failures"] + count["errors"]
    return {**count, "held": held, "seconds": float(suite.get("time", 0)), **measured}


def random_signals(cuts: int, seed: int = 0) -> dict:
    """One run, cut so often at random moments; its samples and losses against the uncut run's."""
    rng = random.Random(seed)
    seen: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        setting = write_setting(root)
        steps = {"train": {"steps": 20 * cuts, "micro_batch_size": 1, "global_batch_size": 2}}
        every = {"checkpoint": {"every": 7, "keep": 2}}
        recipe, whole = write_recipe(setting, root / "whole", **steps)
        with ranks(root / "logs", recipe, 2) as running:
            assert running.codes(600) == [0, 0], running.log(0)
        recipe, output = write_recipe(setting, root / "cut", **steps, **every)
        for number in tqdm(range(cuts), desc="cuts", unit="cut"):
            with ranks(root / f"logs-{number}", recipe, 2) as running:
                time.sleep(rng.uniform(1.0, 7.0))
                for _ in range(rng.choice([1, 1, 2])):
                    which = rng.choice([signal.SIGTERM, signal.SIGUSR1])
                    running.signal(rng.randrange(2), which)
                codes = running.codes(60)
            assert codes in ([REQUEUE] * 2, [0, 0]), (codes, running.log(0)[-2000:])
            seen[str(codes)] = seen.get(str(codes), 0) + 1
        with ranks(root / "logs-last", recipe, 2) as running:
            assert running.codes(600) == [0, 0], running.log(0)
        losses = [{line["step"]: line["loss/lm"] for line in metrics(o)} for o in (whole, output)]
        same = losses[0] == losses[1] and read_sample_log(whole) == read_sample_log(output)
    return {"cuts": cuts, "seed": seed, "exit codes": seen, "as uncut": same}


def keep(results: dict) -> None:
    """After every fault: they take half an hour."""
    command = shlex.join(["python", "-m", "tests.cluster.faults", *sys.argv[1:]])
    written = results | provenance() | {"command": command}
    RESULTS.write_text(json.dumps(written, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="+", help="faults by number")
    parser.add_argument("--signals", type=int, default=0, help="random moments of one run")
    arguments = parser.parse_args()
    os.environ["GEMOE_FORK"] = "0"  # ranks are processes of their own: see launches.py
    chosen = [f for f in FAULTS if not arguments.only or f.number in arguments.only]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"faults": {}}
    for fault in tqdm(chosen, desc="faults", unit="fault"):
        outcome = run(fault) if fault.tests else {"held": None, "why": "needs a GPU; not run"}
        results["faults"][str(fault.number)] = asdict(fault) | outcome
        tqdm.write(f"{fault.number:>2} {fault.what}: {_said(outcome)}")
        keep(results)
    if arguments.signals:
        results["random signals"] = random_signals(arguments.signals)
        tqdm.write(str(results["random signals"]))
    keep(results)
    failed = [number for number, entry in results["faults"].items() if entry["held"] is False]
    sys.exit(f"not held: {', '.join(failed)}" if failed else 0)


def _said(outcome: dict) -> str:
    if outcome["held"] is None:
        return str(outcome["why"])
    seconds = ", ".join(f"{k} {v:.1f} s" for k, v in outcome.items() if k in TIMES)
    return f"{'held' if outcome['held'] else 'DID NOT HOLD'} {seconds}"


TIMES = ("detected", "recovered")

if __name__ == "__main__":
    main()
