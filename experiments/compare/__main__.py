"""Every way to spend fewer experts on the demo's models, under the rules of a grid file.

Runs go side by side, one a core; each result is kept as it ends, and the same command goes on, on
another machine too: runs whose answers are in results/compare are not run again. The report there
says what was found. `--trials` first chooses every row's settings, on the validation split, and
writes them beside the grid; the test split is read by the contest alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path

from experiments import CHECKOUT
from experiments.compare.answers import (
    CONTEST,
    Answers,
    collect,
    left_to_run,
    read_answers,
    write_answers,
)
from experiments.compare.grid import Size, read_grid
from experiments.compare.jobs import QUICK_RUNS, RUNS, Plan, preparation
from experiments.compare.pool import INTERRUPTED, Pool, cores
from experiments.compare.standings import standings
from experiments.compare.trials import SETS, choose, read_trials, record_of, taken, write_trials
from experiments.steps import Progress, Step, list_or_run
from gemoe_ds.errors import ConfigError, exit_on_error
from gemoe_ds.files import write_text
from gemoe_ds.parser import Parser, at_least_one

GRID = Path("experiments/grids/contest.yaml")
OUT = Path("results/compare")


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m experiments.compare", description=__doc__)
    parser.add_argument("--grid", type=Path, default=GRID)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="some rows (default: all)")
    parser.add_argument("--backbones", nargs="+", help="some backbones (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", help="router seeds (default: the grid's)")
    parser.add_argument("--training", nargs="+", help="some training sets (default: all)")
    parser.add_argument("--jobs", type=at_least_one, default=cores(), help="runs side by side")
    parser.add_argument("--quick", action="store_true", help="20 minutes on 2 cores; says less")
    parser.add_argument("--trials", action="store_true", help="only choose settings")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--report", action="store_true", help="only write the report again")
    parser.add_argument("--out", type=Path, help="folder of the report")
    arguments = parser.parse_or_exit(argv)
    os.chdir(CHECKOUT)
    with exit_on_error():
        command = "python -m experiments.compare " + shlex.join(argv or sys.argv[1:])
        return compete(arguments, command.strip())


def compete(arguments: argparse.Namespace, command: str) -> int:
    out = arguments.out or (RUNS.with_name("compare_report") if arguments.quick else OUT)
    grid = read_grid(arguments.grid)
    tried = read_trials(record_of(arguments.grid), grid)
    size = grid.quick if arguments.quick else grid.full
    runs = QUICK_RUNS if arguments.quick else RUNS
    plan = Plan(grid, size, taken(tried), runs)
    rows = _chosen("--only", arguments.only, list(grid.rows))
    sets = [s for s in SETS if s in _chosen("--training", arguments.training, list(SETS))]
    backbones = _chosen("--backbones", arguments.backbones, size.backbones)
    seeds = arguments.seeds or size.seeds
    kept = read_answers(out) if (out / CONTEST).exists() and not arguments.trials else None
    if arguments.trials:
        jobs = whole = Plan(grid, grid.full, {}, runs).trials(rows, sets, done=tried)
    else:
        jobs = plan.contest(rows, backbones, seeds, sets)
        whole = plan.contest(list(grid.rows), size.backbones, _seeds(seeds, size, kept))
    before = preparation()
    if arguments.list:
        print("\n".join(shlex.join(s.command) for s in [*before, *(j.step for j in jobs)]))
        return 0
    progress = Progress(runs / "steps", [*before, *(job.step for job in whole)])
    code = 0
    if not arguments.report:
        code = _run(
            before, [job.step for job in left_to_run(jobs, progress, kept)], progress, arguments
        )
    if arguments.trials:
        path = record_of(arguments.grid)
        write_trials(path, tried | choose(grid, jobs, progress))
        print(f"saved {path}")
        return code
    answers = collect(grid, whole, tried, progress, kept, is_quick=arguments.quick, command=command)
    write_answers(out, answers)
    if code != INTERRUPTED:
        write_report(read_answers(out), out)
    return code


def _seeds(asked: list[int], size: Size, kept: Answers | None) -> list[int]:
    """The grid's, those that are asked for, and those whose answers are kept."""
    measured = kept.contest.measured if kept else ()
    more = {*asked, *(m.seed for m in measured if m.seed is not None)} - {*size.seeds}
    return [*size.seeds, *sorted(more)]


def _chosen(option: str, wanted: list[str] | None, known: list[str]) -> list[str]:
    """In the grid's order; ConfigError for what is not in it."""
    if unknown := sorted(set(wanted or ()) - set(known)):
        raise ConfigError(f"{option} {' '.join(unknown)}: there are {', '.join(known)}")
    return [name for name in known if wanted is None or name in wanted]


def _run(
    before: list[Step], steps: list[Step], progress: Progress, arguments: argparse.Namespace
) -> int:
    if not steps:
        return 0
    code = list_or_run(before, RUNS.parent / "steps", list_only=False, report=None)
    return code or Pool(steps, progress, arguments.jobs, progress.folder.with_name("logs")).run()


def write_report(answers: Answers, out: Path) -> None:
    """standings.json, report.md and figures, from what contest.json and answers.npz hold."""
    from experiments.compare.plot import write_figures
    from experiments.compare.report import render
    from experiments.compare.verdict import verdict
    from gemoe_ds.analysis.paired import RESAMPLES, Bootstrap

    contest = answers.contest
    bootstrap = Bootstrap(answers.asked, RESAMPLES)
    where = dict.fromkeys((m.backbone, m.training) for m in contest.measured)
    first, *rest = [standings(answers, bootstrap, *place) for place in where]
    figures = write_figures(contest, first, out / "figures")
    text = json.dumps([_plain(found) for found in (first, *rest)], indent=1)
    write_text(out / "standings.json", text + "\n")
    write_text(out / "report.md", render(contest, first, rest, figures))
    print("\n".join(verdict(contest.grid, first, rest)))
    print(f"   report      {out}/report.md")


def _plain(found: object) -> object:
    """Standings as JSON has them: keys of two parts are joined."""
    if dataclasses.is_dataclass(found):
        return {f.name: _plain(getattr(found, f.name)) for f in dataclasses.fields(found)}
    if isinstance(found, dict):
        return {f"{row} {k:g}": _plain(value) for (row, k), value in found.items()}
    return found


if __name__ == "__main__":
    sys.exit(main())
