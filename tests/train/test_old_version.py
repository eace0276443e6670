"""A run that version 0.1 began goes on: golden/v0_1 is what its code left after two of four steps.

The recipe has the old names of options; metrics.jsonl and ledger/ hold all four steps as that
version went through them.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.helpers import run_python
from tests.train.sample_logs import read_sample_log

GOLDEN = Path(__file__).parent / "golden/v0_1"


def losses(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss/lm"] for line in lines if "loss/lm" in line}


def test_the_next_steps_are_those_of_the_old_version(tmp_path):
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    ended = run_python(
        "launch/train.py",
        tmp_path / "recipe.yaml",
        f"output_dir={tmp_path}/run",
        "--resume",
        "auto",
    )
    assert ended.returncode == 0, ended.stderr
    assert "step-000002" in ended.stdout
    changed = re.findall(r"^  (\S+) +(?:\S+) -> ", ended.stdout, re.MULTILINE)
    places = ["checkpoint", "train_path", "validation_path", "tokenizer", "deepspeed"]
    assert [name.rpartition(".")[2] for name in changed] == places
    assert "warning: train.micro_batch is called train.micro_batch_size now" in ended.stderr
    before, after = losses(GOLDEN / "run"), losses(tmp_path / "run")
    assert set(after) == set(before) == {1, 2, 3, 4}
    assert list(after.values()) == pytest.approx(list(before.values()), rel=1e-5)
    first = (GOLDEN / "run/ledger/rank-00000.jsonl").read_text()
    wanted = [json.loads(line)["ids"] for line in first.splitlines()]
    seen = read_sample_log(tmp_path / "run")
    assert [i for ids in seen.values() for i in ids] == [i for ids in wanted for i in ids]
