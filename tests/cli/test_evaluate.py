"""launch/evaluate.py as a process: what a run trained, and how often bfloat16 moves k."""

from __future__ import annotations

import json

import pytest

from gemoe_ds.cli.evaluate import main
from tests.helpers import run_here, run_python, run_ranks
from tests.train.resuming import make_config, train_all, write_setting

OTHERWISE = "the model is not as it was trained"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def runs(setting):
    """By dtype."""
    folder = {dtype: setting["root"] / dtype for dtype in ("bfloat16", "float32")}
    configs = [
        make_config(setting, run, model__dtype=dtype, parallel__ep_size=1)
        for dtype, run in folder.items()
    ]
    assert run_ranks(train_all, 1, configs) == [None]
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_flips_against_float32_are_counted(setting, runs, tmp_path, dtype):
    run = runs[dtype]
    command = ["launch/evaluate.py", run / "config.yaml"]
    command += ["--trained", run, "--data", setting["data"], "--out", tmp_path / "out", "--flips"]
    done = run_python(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "out/eval.json").read_text())["method"] == "gemoe"
    flips = json.loads((tmp_path / "out/k_flips.json").read_text())
    assert flips["dtype"] == dtype and flips["tokens"] > 100
    shares = flips["flipped_per_layer"]
    assert len(shares) == 2 and max(shares) < 0.2
    assert dtype == "bfloat16" or shares == [0.0, 0.0]


def test_budgets_are_met_and_their_settings_work_in_a_recipe(setting, runs, tmp_path):
    """--mean-k 2.5 on the data of the evaluation; then the printed shift as an override."""
    run = runs["float32"]
    command = ["launch/evaluate.py", run / "config.yaml"]
    command += ["--trained", run, "--data", setting["data"]]
    budgets = ["--out", tmp_path / "out", "--mean-k", "2.5", "3"]
    done = run_python(*command, *budgets)
    assert done.returncode == 0, done.stderr[-2000:]
    settings = [w for w in done.stdout.split() if w.startswith("model.router.k_")]
    assert len(settings) == 4 and OTHERWISE not in done.stdout
    for index, target in enumerate((2.5, 3.0)):
        record = json.loads((tmp_path / f"out/mean_k_{target:g}/eval.json").read_text())
        assert record["mean_k"] == pytest.approx(target, rel=0.02)
        assert record["budget_k"] == target and record["k"] is None
        again = [*command, *settings[2 * index : 2 * index + 2], "--out", tmp_path / "again"]
        done = run_python(*again)
        assert done.returncode == 0, done.stderr[-2000:]
        shift = settings[2 * index + 1].split("=")[0]
        assert OTHERWISE in done.stdout and shift in done.stdout
        same = json.loads((tmp_path / "again/eval.json").read_text())
        assert same["mean_k_per_layer"] == record["mean_k_per_layer"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--k", "2", "--mean-k", "3"], "--mean-k goes with --trained RUN"),
        (["--trained", "run", "--mean-k", "3", "--name", "My name"], "lower case letters"),
    ],
)
def test_wrong_options_are_refused(options, message, setting, tmp_path):
    command = ["unused.yaml", *options, "--data", setting["data"], "--out", tmp_path / "out"]
    done = run_here(main, *command)
    assert done.returncode == 2 and message in done.stderr


def test_flips_of_a_static_k_are_refused(setting, tmp_path):
    command = ["unused.yaml", "--k", "2", "--flips"]
    done = run_here(main, *command, "--data", setting["data"], "--out", tmp_path / "out")
    assert done.returncode == 2 and "a static k never flips" in done.stderr
