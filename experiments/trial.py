"""Something to try a launcher with, in a minute: data and a small backbone in runs/trial.

Then launch/recipes/trial.yaml trains GeMoE on it, for 120 steps, on one rank or two. The same
scripts as `make demo` with fewer scenes and two steps of pretraining: it learns nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from experiments import CHECKOUT
from experiments.demo import data_steps, python_step
from experiments.steps import Progress, Step, run_steps
from gemoe_ds.parser import Parser

TRIAL = Path("runs/trial")
PRETRAIN = "experiments/recipes/trial_pretrain.yaml"


def trial_steps(root: Path) -> list[Step]:
    places = f"data.train_path={root}/data/train data.tokenizer={root}/tokenizer"
    few = "--train 300 --validation 20 --test 20"
    steps = data_steps(("train", "test"), root, few, seconds=6)
    steps.append(
        python_step(
            "tokenizer",
            f"data_prep/train_tokenizer.py --data {root}/data/train --out {root}/tokenizer",
            root / "tokenizer",
            seconds=5,
            needs=("convert_train",),
        )
    )
    steps.append(
        python_step(
            "pretrain",
            f"launch/train.py {PRETRAIN} {places} output_dir={root}/pretrain --resume auto",
            root / "pretrain",
            seconds=15,
            needs=("tokenizer",),
        )
    )
    return steps


def main() -> int:
    parser = Parser("python -m experiments.trial", description=__doc__)
    parser.add_argument("--out", type=Path, default=TRIAL, help=f"folder (default: {TRIAL})")
    root = parser.parse_or_exit().out
    os.chdir(CHECKOUT)
    steps = trial_steps(root)
    code = run_steps(steps, Progress(root / "steps", steps))
    if code == 0 and root == TRIAL:
        print("   now, for example: launch/train.py launch/recipes/trial.yaml parallel.ep_size=1")
    return code


if __name__ == "__main__":
    sys.exit(main())
