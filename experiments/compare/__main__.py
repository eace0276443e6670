"""Every way to spend fewer experts on the demo's models, under the rules of a grid file.

Runs go side by side, one a core; each result is kept as it ends, and the same command goes on. The
report says what was found: results/compare. `--trials` first chooses every row's settings, on the
validation split, and writes them beside the grid; the test split is read by the contest alone.
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
from experiments.compare.answers import Answers, Tried, collect, read_answers, write_answers
from experiments.compare.grid import Grid, read_grid
from experiments.compare.jobs import QUICK_RUNS, RUNS, Job, Plan, preparation
from experiments.compare.pool import Pool, cores
from experiments.compare.standings import standings
from experiments.compare.trials import choose, read_trials, record_of, taken, write_trials
from experiments.steps import Progress, list_or_run
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
    if arguments.trials:
        jobs = Plan(grid, grid.full, {}, runs).trials(rows)
    else:
        backbones = _chosen("--backbones", arguments.backbones, size.backbones)
        jobs = plan.contest(rows, backbones, arguments.seeds or size.seeds)
    if arguments.list:
        print("\n".join(shlex.join(s.command) for s in [*preparation(), *(j.step for j in jobs)]))
        return 0
    code = 0
    if not arguments.report:
        code = _run(jobs, runs, arguments.jobs)
    if code == 130:
        return code
    if arguments.trials:
        return code or _write_trials(grid, jobs, tried, record_of(arguments.grid))
    answers = collect(grid, jobs, tried, is_quick=arguments.quick, command=command)
    write_answers(out, answers)
    write_report(read_answers(out), out)
    return code


def _chosen(option: str, wanted: list[str] | None, known: list[str]) -> list[str]:
    """In the grid's order; ConfigError for what is not in it."""
    if unknown := sorted(set(wanted or ()) - set(known)):
        raise ConfigError(f"{option} {' '.join(unknown)}: there are {', '.join(known)}")
    return [name for name in known if wanted is None or name in wanted]


def _run(jobs: list[Job], runs: Path, width: int) -> int:
    before = preparation()
    code = list_or_run(before, runs.parent / "steps", list_only=False, report=None)
    if code:
        return code
    steps = [job.step for job in jobs]
    return Pool(steps, Progress(runs / "steps", [*before, *steps]), width, runs / "logs").run()


def _write_trials(grid: Grid, jobs: list[Job], tried: dict[str, Tried], path: Path) -> int:
    write_trials(path, tried | choose(grid, jobs))
    print(f"saved {path}")
    return 0


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
