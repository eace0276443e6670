"""The small job of `make trial`, in a folder of a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import repository

RECIPE = "launch/recipes/trial.yaml"


def write_trial(root: Path) -> Path:
    """Its data and its backbone."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.trial", "--out", str(root)],
        cwd=repository(),
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return root


def options(root: Path, output: Path, *more: str) -> list[str]:
    """Where it is, and what else differs from the recipe."""
    return [
        f"data.train_path={root}/data/train",
        f"data.tokenizer={root}/tokenizer",
        f"model.checkpoint={root}/pretrain/hf",
        f"output_dir={output}",
        *more,
    ]
