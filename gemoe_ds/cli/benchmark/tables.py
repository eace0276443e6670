"""The paper's tables and figures from runs that were answered and scored, its own rows beside.

    gemoe benchmark tables RUN [RUN ...] --out DIR --html

RUN is the folder of a run, the --out of `gemoe benchmark answer`, or one of the modes in it. Runs
that differ in their seed alone share a row. DIR gets report.md, results.json, table_*.csv, figures/
and, with --html, report.html: one page that needs no other file and no network.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemoe_ds.analysis.benchmarks.collect import ModeRun, read_modes
from gemoe_ds.analysis.benchmarks.groups import Model, models_of
from gemoe_ds.analysis.benchmarks.report import render_report, table_csv, terminal_tables
from gemoe_ds.analysis.benchmarks.results import BenchmarkResults
from gemoe_ds.analysis.benchmarks.tables import build_results
from gemoe_ds.errors import CheckpointError, exit_on_error
from gemoe_ds.files import write_text, writing_into
from gemoe_ds.parser import Parser

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--html", action="store_true", help="also report.html, one page with all")
    parser.add_argument(
        "--tensorboard", type=Path, help="also log figures and rows to TensorBoard in this folder"
    )
    argv = sys.argv[1:] if argv is None else argv
    flags = parser.parse_or_exit(argv)
    if flags.tensorboard and flags.tensorboard.is_file():
        parser.error(f"--tensorboard {flags.tensorboard}: is a file; give a folder")
    with exit_on_error():
        runs = read_modes(flags.runs)
        command = shlex.join(["gemoe", "benchmark", "tables", *argv])
        results = build_results(runs, command=command)
        with writing_into(flags.out):
            write_report(results, models_of(runs), flags)
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(terminal_tables(results, width), end="")


def write_report(results: BenchmarkResults, models: Sequence[Model], flags: Any) -> None:
    """All files, results.json last."""
    import gemoe_ds.analysis.benchmarks.expert_figures  # noqa: F401  (registers; slow to import)
    from gemoe_ds.analysis.benchmarks.figures import write_figures

    out: Path = flags.out
    (out / "results.json").unlink(missing_ok=True)
    with board_in(flags.tensorboard) as board:
        figures = write_figures(models, gates_of(models), out / "figures", board)
        if board:
            from gemoe_ds.analysis.benchmarks.board import write_rows

            write_rows(models, board)
    results = results.model_copy(update={"figures": figures})
    write_text(out / "report.md", render_report(results))
    for table in results.tables:
        write_text(out / f"table_{table.number}.csv", table_csv(table))
    if flags.html:
        from gemoe_ds.analysis.benchmarks.page import render_html

        answers = [
            (group, group.first)
            for model in models
            for group in sorted(model.groups, key=lambda group: not group.is_adaptive)
            if group.is_adaptive or group is model.baseline
        ]
        write_text(out / "report.html", render_html(results, out / "figures", answers))
    write_text(out / "results.json", results.model_dump_json(indent=1, exclude_none=True) + "\n")


@contextmanager
def board_in(folder: Path | None) -> Iterator[SummaryWriter | None]:
    if folder is None:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and rarely wanted

    with SummaryWriter(str(folder)) as board:
        yield board


def gates_of(models: Sequence[Model]) -> Mapping[str, Any]:
    """Of the first method that was trained; none, and a line why, where files are gone."""
    trained = [run for model in models for run in model.runs if run.mode.checkpoint]
    if len(models) > 1 or not trained:
        return {}
    from gemoe_ds.checkpoint.gates import read_gates  # imports torch

    first = min(trained, key=lambda run: run.mode.k is not None)
    try:
        return read_gates(checkpoint_of(first))
    except CheckpointError as error:
        print(f"no figure of expert similarity: {error}", file=sys.stderr)
        return {}


def checkpoint_of(run: ModeRun) -> Path:
    """Where the command that answered saw it, or in the run that the answers lie in."""
    named = Path(run.mode.checkpoint or "")
    in_run = run.folder.resolve().parents[1] / "checkpoints" / named.name
    return in_run if in_run.is_dir() and not named.is_dir() else named


if __name__ == "__main__":
    main()
