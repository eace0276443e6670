"""Backbones from folders in the public layout, through the whole path: train, resume, evaluate."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from gemoe_ds.data.sample import Sample, Turn, write_samples
from gemoe_ds.engine.manifest import newest
from tests.backbones.cases import CASES, write_case
from tests.helpers import repository, run_ranks
from tests.train.resuming import losses, make_config, train_all, write_data


def write_text(folder):
    turns = [Turn("a b", "c d"), Turn("e", "f"), Turn("g h", "a")]
    samples = (Sample(f"s{i}", None, (turns[i % 3],)) for i in range(20))
    write_samples(samples, folder, source="test")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_trains_resumes_and_is_scored(name, tmp_path):
    base, tokenizer = write_case(name, tmp_path)
    write_samples_of = write_data if CASES[name].sees else write_text
    data = write_samples_of(tmp_path / "data")
    setting = {"hf": base, "tokenizer": tokenizer, "data": data}
    changes = {
        "model__backbone": {"name": name},
        "train": {"steps": 3, "micro_batch": 1, "global_batch": 4},
        "checkpoint__every": 1,
        "data__max_length": 400,
    }
    whole = make_config(setting, tmp_path / "whole", **changes)
    assert run_ranks(train_all, 2, [whole]) == [None] * 2
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(newest(tmp_path / "cut"))
    rest = make_config(setting, tmp_path / "cut", parallel__ep_size=1, resume="auto", **changes)
    assert run_ranks(train_all, 1, [rest]) == [None]
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    command = [sys.executable, repository() / "launch/evaluate.py", tmp_path / "whole/config.yaml"]
    command += ["--trained", tmp_path / "whole", "--data", setting["data"]]
    done = subprocess.run(
        [*command, "--out", tmp_path / "out"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0 < json.loads((tmp_path / "out/eval.json").read_text())["mean_k"] <= 3
