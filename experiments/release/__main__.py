"""Measure every claim of README and docs on this state of the source: `make results`.

Runs what has not run on it yet, in one order, a day on two cores; it can be stopped at any time,
and the same command goes on. Each part's results can be committed as it ends (`--commit`).
results/README.md then has every claim with its figure, command, commit, machine and date.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments import CHECKOUT
from experiments.release.claim import state
from experiments.release.claims import all_claims
from experiments.release.page import page
from experiments.release.ran import Ran, has_ended, note_begun, note_ended, read_ran
from experiments.release.source import source_hash
from experiments.release.stages import STAGES, Stage, lacking
from experiments.steps import Bar, environment
from gemoe_ds.errors import ConfigError, exit_on_error
from gemoe_ds.files import write_text
from gemoe_ds.parser import Parser

RESULTS = Path("results")
PAGE = RESULTS / "README.md"


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m experiments.release", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="PART", help="some parts (default: all)")
    parser.add_argument("--again", action="store_true", help="also those that ran on this source")
    parser.add_argument("--commit", action="store_true", help="commit each part's results")
    parser.add_argument("--list", action="store_true", help="print what would run, run nothing")
    parser.add_argument("--page", action="store_true", help="only write results/README.md")
    arguments = parser.parse_or_exit(argv)
    os.chdir(CHECKOUT)
    with exit_on_error():
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    source = source_hash(CHECKOUT)
    if arguments.page:
        write_page(source)
        return 0
    ran = read_ran(RESULTS)
    todo = [
        stage
        for stage in chosen(arguments.only)
        if arguments.again or not has_ended(ran, stage, source)
    ]
    missing = {stage: lacking(stage) for stage in todo}
    able = [stage for stage in todo if not missing[stage]]
    for stage, lacked in missing.items():
        if lacked:
            print(f"== {stage.name} is left out: this machine lacks {', '.join(lacked)}")
    if arguments.list:
        print("\n".join(f"{stage.name}: {stage.command}" for stage in able))
        return 0
    code = measure(able, source, commit=arguments.commit)
    write_page(source)
    return code


def chosen(names: Sequence[str] | None) -> list[Stage]:
    """In the order of `STAGES`; ConfigError for a name that is not there."""
    known = [stage.name for stage in STAGES]
    if unknown := sorted(set(names or ()) - set(known)):
        raise ConfigError(f"--only {' '.join(unknown)}: there are {', '.join(known)}")
    return [stage for stage in STAGES if names is None or stage.name in names]


def measure(stages: Sequence[Stage], source: str, *, commit: bool) -> int:
    """Run stages in order, each noted as it ends. One that fails is named, and the others run.

    Gives 0, the exit code of the first that failed, or 130 where it was interrupted.
    """
    bar, failed = Bar(stages, stages), dict[str, int]()
    for stage in stages:
        print(f"\n{bar.before(stage)}\n$ {stage.command}", flush=True)
        row, started, command = begin(stage, source), time.monotonic(), command_of(stage)
        try:
            code = subprocess.run(command, env=environment(command)).returncode
        except KeyboardInterrupt:
            print("\n== interrupted; run the same command to go on from here", flush=True)
            return 130
        if source_hash(CHECKOUT) != source:
            print(
                f"== the source changed while {stage.name} ran: its results count for neither "
                "state; run the same command again",
                file=sys.stderr,
            )
            return 1
        if code != 0:
            failed[stage.name] = code
            print(f"== {stage.name} failed (exit code {code})", file=sys.stderr, flush=True)
            continue
        note_ended(RESULTS, stage, row, time.monotonic() - started)
        if commit:
            _commit(stage, source)
        bar.finish(stage)
    print(f"\n{bar.at_end()}", flush=True)
    if failed:
        print(f"== failed: {', '.join(failed)}; the same command runs them again", file=sys.stderr)
    return next(iter(failed.values()), 0)


def begin(stage: Stage, source: str) -> Ran:
    """Its row. On the first try on this source nothing is left to go on from."""
    before = read_ran(RESULTS).get(stage.name)
    if before is not None and before.source == source:
        return before
    for path in map(Path, stage.anew):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return note_begun(RESULTS, stage, source)


def command_of(stage: Stage) -> list[str]:
    """With this interpreter for `python`."""
    words = shlex.split(stage.command)
    return [sys.executable, *words[1:]] if words[0] == "python" else words


def write_page(source: str) -> None:
    claims = [state(claim, RESULTS) for claim in all_claims()]
    write_text(PAGE, page(CHECKOUT, claims, read_ran(RESULTS), source))
    print(f"saved {PAGE}")


def _commit(stage: Stage, source: str) -> None:
    """The results alone, whatever else is staged or changed."""
    paths = ["results", "experiments/grids"]
    subprocess.run(["git", "add", *paths], check=True)
    changed = subprocess.run(["git", "diff", "--cached", "--quiet", "--", *paths]).returncode
    if changed:
        message = f"Results of {stage.name} on source {source}"
        subprocess.run(["git", "commit", "-q", "-m", message, "--", *paths], check=True)


if __name__ == "__main__":
    sys.exit(main())
