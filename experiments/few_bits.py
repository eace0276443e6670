"""What 8 and 4 bits cost a trained run: results/few_bits.json.

    python -m experiments.few_bits RUN --data FOLDER

evaluates it with weights in every precision, and compares with dtype as it is: accuracy with a
paired interval over pictures, the answers that change, and for how many tokens of a layer k does.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from gemoe_ds.analysis.paired import NO_SEED, Bootstrap
from gemoe_ds.analysis.provenance import provenance
from gemoe_ds.analysis.record import RECORD, ROUTING, read_questions, read_record
from gemoe_ds.analysis.routing_sums import RoutingSums
from gemoe_ds.checkpoint.manifest import newest
from gemoe_ds.data.schema import MANIFEST
from gemoe_ds.errors import ConfigError, exit_on_error
from gemoe_ds.parser import Parser

PRECISIONS = [  # experts, the rest
    (None, None),
    ("int8", None),
    ("float8", None),
    ("nf4", None),
    (None, "int8"),
    ("nf4", "int8"),
]


def evaluate(run: Path, data: Path, out: Path, precision: tuple[str | None, str | None]) -> None:
    command = [sys.executable, "-m", "gemoe_ds", "evaluate", str(run / "config.yaml")]
    for name, value in zip(("experts_dtype", "dense_dtype"), precision, strict=True):
        command.append(f"model.{name}={value or 'null'}")
    command += ["--trained", str(run), "--data", str(data), "--out", str(out)]
    print(f"-- {shlex.join(command)}", flush=True)
    subprocess.run(command, check=True)


def compared(folder: Path, whole: Path) -> dict[str, Any]:
    """What is in one evaluation, beside that of `whole`."""
    (record, _), (of_whole, _) = read_record(folder), read_record(whole)
    asked, before = read_questions(folder, record), read_questions(whole, of_whole)
    bootstrap = Bootstrap(asked)
    found, other = (bootstrap.accuracies({NO_SEED: one.right_Q}) for one in (asked, before))
    difference = bootstrap.difference(found, other)
    routed, exact = (RoutingSums.load(path / ROUTING) for path in (folder, whole))
    if not np.array_equal(routed.hash_N, exact.hash_N):
        raise ConfigError(f"{folder} and {whole} are of other tokens; give a new --runs")
    return {
        "accuracy": record.accuracy,
        "mean_k": record.mean_k,
        "accuracy_more": [difference.value, difference.low, difference.high],
        "answers_changed": float((asked.right_Q != before.right_Q).mean()),
        "k_changed": float((routed.k_LN != exact.k_LN).mean()),
        "k_changed_by_more_than_1": float((np.abs(routed.k_LN - exact.k_LN) > 1).mean()),
        "tokens": int(routed.hash_N.size),
        "questions": int(asked.right_Q.size),
    }


def _identity(run: Path, data: Path) -> str:
    """A folder's name for this run on this data: another one is evaluated anew."""
    parts = (str(newest(run)), (data / MANIFEST).read_text(encoding="utf-8"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def main() -> int:
    parser = Parser("python -m experiments.few_bits", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--data", type=Path, required=True, help="samples to answer")
    parser.add_argument("--runs", type=Path, default=Path("runs/few_bits"), help="evaluations")
    parser.add_argument("--out", type=Path, default=Path("results/few_bits.json"))
    arguments = parser.parse_or_exit()
    with exit_on_error():
        found, runs = {}, arguments.runs / _identity(arguments.run, arguments.data)
        for precision in PRECISIONS:
            name = f"experts {precision[0] or 'whole'}, the rest {precision[1] or 'whole'}"
            folder = runs / "_".join(one or "whole" for one in precision)
            if not (folder / RECORD).exists():
                evaluate(arguments.run, arguments.data, folder, precision)
            found[name] = compared(folder, runs / "whole_whole")
            print(f"{name}: {found[name]}", flush=True)
        report = {"precisions": found} | provenance()
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"   report      {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
