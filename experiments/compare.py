"""Every routing method on the demo's backbone, three seeds each: the paper's tables 1, 2 and 5.

Trains and scores the grid of grids/demo.yaml; same samples, steps and learning rate for all. A
finished step is skipped when this runs again, an interrupted one goes on where it was.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from experiments import CHECKOUT
from experiments.demo import (
    DATA,
    DEMO,
    STATIC_FOLDERS,
    data_steps,
    evaluate_step,
    python_step,
    static_step,
    train_step,
)
from experiments.steps import Step, list_or_run
from gemoe_ds.errors import ConfigError, exit_on_error
from gemoe_ds.files import write_text
from gemoe_ds.parser import Parser

GRID = Path("experiments/grids/demo.yaml")
OUT = Path("results/compare")
RUNS = DEMO / "compare"
SECONDS = {"ada_k": 220}  # of training on 2 CPU cores; the others take about 65


@dataclass(frozen=True)
class Grid:
    """Routers and their learning rates by name of the row, and budgets for trained ones."""

    methods: dict[str, dict]
    budgets: dict[str, list[float]]
    seeds: tuple[int, ...]

    @classmethod
    def read(cls, path: Path, seeds: Sequence[int], only: Sequence[str] | None) -> Grid:
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
            unknown = set(only or ()) - set(tree["methods"])
        except (OSError, UnicodeError, yaml.YAMLError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--grid {path} is no grid of methods and budgets: {error}"
            ) from error
        if unknown:
            raise ConfigError(
                f"--methods {' '.join(sorted(unknown))}: not in {path}; there are: "
                + ", ".join(tree["methods"])
            )
        chosen = {n: r for n, r in tree["methods"].items() if only is None or n in only}
        budgets = {n: b for n, b in tree["budgets"].items() if n in chosen}
        return cls(chosen, budgets, tuple(seeds))

    def runs(self) -> list[tuple[str, int]]:
        """Seeds outermost: a cut run has whole tables of the first seeds."""
        return [(name, seed) for seed in self.seeds for name in self.methods]


def folder_of(name: str, seed: int) -> Path:
    return RUNS / f"{name}_seed_{seed}"


def compare_steps(grid: Grid, num_ranks: int, out: Path, report: Sequence[str]) -> list[Step]:
    """The backbone, the static rows, then run after run; `report` are the report's arguments."""
    steps = [*data_steps(), static_step(num_ranks)]
    scored = ["evaluate_static"]
    for name, seed in grid.runs():
        run, label = folder_of(name, seed), f"compare_{name}_seed_{seed}"
        row = grid.methods[name]
        router = yaml.safe_dump(row["router"], default_flow_style=True, width=1000).strip()
        overrides = [f"model.router={router}"]
        if "predictor_lr" in row:
            overrides.append(f"optim.predictor_lr={row['predictor_lr']}")
        steps.append(
            train_step(
                label,
                "demo_gemoe",
                num_ranks,
                run,
                SECONDS.get(name, 65),
                needs=DATA,
                seed=seed,
                overrides=overrides,
            )
        )
        method = "top_k_tuned" if name.startswith("top_k_") else name
        trained = f"{run}/config.yaml --trained {run}"
        steps.append(
            evaluate_step(
                label, f"{trained} --name {method}", run / "test", num_ranks, needs=(label,)
            )
        )
        scored.append(steps[-1].name)
        if name in grid.budgets:
            budgets = " ".join(f"{k:g}" for k in grid.budgets[name])
            arguments = f"{trained} --name {method} --mean-k {budgets}"
            steps.append(
                evaluate_step(
                    f"{label}_budgets",
                    arguments,
                    run / "budgets",
                    num_ranks,
                    needs=(label,),
                    seconds=60 + 20 * len(grid.budgets[name]),
                )
            )
            scored.append(steps[-1].name)
    arguments = f"-m experiments.compare --report --out {out} {shlex.join(report)}"
    steps.append(
        python_step("report", arguments, out / "report.md", seconds=10, needs=tuple(scored))
    )
    return steps


def write_report(grid: Grid, out: Path, command: str) -> None:
    """comparison.json, report.md and figures from what the runs have left behind."""
    from experiments.comparison import compare, read_curve
    from experiments.comparison_figures import write_comparison_figures
    from experiments.comparison_report import render_comparison, verdicts
    from gemoe_ds.analysis.record import read_record

    records = [read_record(Path(folder))[0] for folder in STATIC_FOLDERS]
    curves = []
    for name, seed in grid.runs():
        run = folder_of(name, seed)
        record, _ = read_record(run / "test")
        records.append(record)
        curves.append(read_curve(run, record))
        for budget in grid.budgets.get(name, []):
            records.append(read_record(run / f"budgets/mean_k_{budget:g}")[0])
    seconds = sum(record.seconds + (record.train_seconds or 0) for record in records)
    comparison = compare(records, curves, command=command, seconds=seconds)
    figures = write_comparison_figures(comparison, out / "figures")
    meta = comparison.results.meta.model_copy(update={"figures": figures})
    results = comparison.results.model_copy(update={"meta": meta})
    comparison = comparison.model_copy(update={"results": results})
    write_text(out / "comparison.json", comparison.model_dump_json(indent=1) + "\n")
    write_text(out / "report.md", render_comparison(comparison))
    print("\n".join(verdicts(comparison)))


def main() -> int:
    parser = Parser("python -m experiments.compare", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="some rows of the grid (default: all)")
    parser.add_argument("--grid", type=Path, default=GRID)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--report", action="store_true", help="only write the report again")
    arguments = parser.parse_or_exit()
    os.chdir(CHECKOUT)
    with exit_on_error():
        grid = Grid.read(arguments.grid, arguments.seeds, arguments.methods)
        chosen = ["--seeds", *map(str, grid.seeds)]
        if arguments.methods:
            chosen += ["--methods", *arguments.methods]
        if arguments.grid != GRID:
            chosen += ["--grid", str(arguments.grid)]
        if arguments.report:
            arguments.out.mkdir(parents=True, exist_ok=True)
            if arguments.out != OUT:
                chosen += ["--out", str(arguments.out)]
            write_report(grid, arguments.out, f"python -m experiments.compare {shlex.join(chosen)}")
            return 0
        steps = compare_steps(grid, min(torch.cuda.device_count() or 2, 2), arguments.out, chosen)
        return list_or_run(steps, DEMO / "steps", list_only=arguments.list, report=arguments.out)


if __name__ == "__main__":
    sys.exit(main())
