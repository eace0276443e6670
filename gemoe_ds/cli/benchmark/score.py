"""Scores of what was answered, by the stock evaluators: one process, no model, no GPU.

    gemoe benchmark score OUT_OR_RUN [OUT_OR_RUN ...] --data-root DIR

OUT_OR_RUN is the folder of a run, the --out of `gemoe benchmark answer`, or one of the modes in it.
scores.json and scored.npz go beside the answers; scoring again replaces them. It may run on another
machine than the answers came from, such as a login node with a network for a judge.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TextIO

from gemoe_ds.errors import exit_on_error
from gemoe_ds.parser import Parser


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUT_OR_RUN")
    parser.add_argument("--tasks", nargs="+", default=(), help="sets, groups or tasks of them only")
    parser.add_argument(
        "--data-root", type=Path, help="a folder that mirrors the hub: DIR/openai/gsm8k"
    )
    parser.add_argument("--download", action="store_true", help="fetch data that is nowhere here")
    parser.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="run programs that the model has written (HumanEval)",
    )
    parser.add_argument(
        "--judge",
        metavar="MODEL",
        help="the model that judges MM-Vet's answers; OPENAI_API_KEY and OPENAI_API_URL say where",
    )
    flags = parser.parse_or_exit(argv)
    with exit_on_error():
        from gemoe_ds.evaluation.benchmarks.harnesses import check_installed

        check_installed()
        from gemoe_ds.evaluation.benchmarks.local_data import DataPlaces
        from gemoe_ds.evaluation.benchmarks.score_modes import ScoreOptions, score_all

        options = ScoreOptions(
            flags.tasks,
            flags.confirm_run_unsafe_code,
            flags.judge,
            DataPlaces(flags.data_root, flags.download),
        )
        score_all(flags.folders, options, lambda text: print(text, file=_stream(text), flush=True))


def _stream(text: str) -> TextIO:
    return sys.stderr if text.startswith("warning:") else sys.stdout


if __name__ == "__main__":
    main()
