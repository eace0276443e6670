"""Report on evaluation folders: a table here, and results.json, report.md and figures."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from pathlib import Path

from gemoe_ds.analysis.ablation import read_ablation
from gemoe_ds.analysis.gains import Gain, gains_of
from gemoe_ds.analysis.record import (
    QUESTIONS,
    SAMPLES,
    read_questions,
    read_record,
    read_samples,
)
from gemoe_ds.analysis.report import render_report, terminal_table
from gemoe_ds.analysis.results import BASELINE, Results, build_results, read_results
from gemoe_ds.errors import exit_on_error
from gemoe_ds.files import write_text, writing_into
from gemoe_ds.parser import Parser


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, metavar="EVAL_DIR")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--results", type=Path, help="only render the report of this results.json")
    parser.add_argument(
        "--tensorboard", type=Path, help="also log the figures to TensorBoard in this folder"
    )
    parser.add_argument("--command", help="command to name in the report (default: this one)")
    parser.add_argument(
        "--seconds", type=float, help="duration to name in the report (default: a sum)"
    )
    argv = sys.argv[1:] if argv is None else argv
    flags = parser.parse_or_exit(argv)
    if bool(flags.folders) == bool(flags.results):
        parser.error("give evaluation folders, or --results FILE")
    if flags.results and (flags.tensorboard or flags.command or flags.seconds is not None):
        parser.error("--results renders what is in the file: it goes with --out alone")
    with exit_on_error(), writing_into(flags.out):
        results = _render_again(flags) if flags.results else _analyze(flags, argv)
        write_text(flags.out / "report.md", render_report(results))
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(terminal_table(results, width), end="")


def _analyze(flags: argparse.Namespace, argv: list[str]) -> Results:
    import gemoe_ds.analysis.expert_figures  # noqa: F401  (registers them; slow to import)
    from gemoe_ds.analysis.figures import write_figures, write_tensorboard

    read = [read_record(folder) for folder in flags.folders]
    command = flags.command or shlex.join(["gemoe", "analyze", *argv])
    results = build_results([record for record, _ in read], command=command, seconds=flags.seconds)
    beside = [
        read_ablation(folder, record.key)
        for folder, (record, _) in zip(flags.folders, read, strict=True)
    ]
    found = {"ablations": tuple(filter(None, beside)), "gains": _gains(flags.folders, results)}
    results = results.model_copy(update=found)
    figures = write_figures(
        results, {record.key: tokens for record, tokens in read}, flags.out / "figures"
    )
    if flags.tensorboard:
        write_tensorboard(figures, flags.out / "figures", flags.tensorboard)
    meta = results.meta.model_copy(update={"figures": figures})
    results = results.model_copy(update={"meta": meta})
    write_text(flags.out / "results.json", results.model_dump_json(indent=2) + "\n")
    return results


def _gains(folders: list[Path], results: Results) -> tuple[Gain, ...]:
    """From the static evaluations, if they left behind what that takes."""
    base_k = results.meta.backbone_k
    static = {
        row.k: (folder, row)
        for folder, row in zip(folders, results.rows, strict=True)
        if row.method == BASELINE and row.k and (folder / QUESTIONS).exists()
    }
    if base_k not in static or not (static[base_k][0] / SAMPLES).exists():
        return ()
    questions = {k: read_questions(folder, row) for k, (folder, row) in static.items()}
    return gains_of(questions, read_samples(static[base_k][0]), base_k)


def _render_again(flags: argparse.Namespace) -> Results:
    """The report shows the figures that lie beside results.json; they are copied to a new place."""
    results = read_results(flags.results)
    source, target = flags.results.parent / "figures", flags.out / "figures"
    there = tuple(f for f in results.meta.figures if (source / f.file).is_file())
    if there and source.resolve() != target.resolve():
        target.mkdir(exist_ok=True)
        for entry in there:
            shutil.copyfile(source / entry.file, target / entry.file)
    meta = results.meta.model_copy(update={"figures": there})
    return results.model_copy(update={"meta": meta})


if __name__ == "__main__":
    main()
