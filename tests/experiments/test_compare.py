"""The comparison: the grid's rows are valid routers, its commands those that it lists."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments.compare import GRID, Grid, compare_steps
from gemoe_ds.config import load_config
from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import Router
from tests.helpers import repository


@pytest.fixture(params=["demo", "budgets"])
def grid(request):
    return Grid.read(repository() / f"experiments/grids/{request.param}.yaml", (0, 1, 2), None)


# Of issue 5; evolve has no k to compare. A newcomer's router is in it when its author says so.
FIELD = {"top_k", "gemoe", "dynmoe", "top_p", "adamoe", "moepp", "remoe", "ada_k", "ltdr", "evomoe"}


def test_every_method_of_the_field_is_in_it():
    grid = Grid.read(repository() / GRID, (0,), None)
    compared = {row["router"]["name"] for row in grid.methods.values()}
    assert compared >= FIELD and compared <= set(Router.names())


def test_rows_differ_in_the_router_and_its_rate_alone(grid, monkeypatch):
    monkeypatch.chdir(repository())
    base = load_config("experiments/recipes/demo_gemoe.yaml", []).model_dump()
    steps = compare_steps(grid, 2, repository(), [])
    for name in grid.methods:
        (step,) = (s for s in steps if s.name == f"compare_{name}_seed_0")
        overrides = [word for word in step.command if word.startswith(("model.", "optim."))]
        made = load_config("experiments/recipes/demo_gemoe.yaml", overrides).model_dump()
        assert made["model"]["router"]["name"] == grid.methods[name]["router"]["name"]
        made["model"]["router"] = base["model"]["router"]
        made["optim"]["predictor_lr"] = base["optim"]["predictor_lr"]
        assert made == base


def test_steps_train_and_score_every_row_once(grid, tmp_path):
    steps = compare_steps(grid, 2, tmp_path, [])
    names = [step.name for step in steps]
    assert len(names) == len(set(names))
    for name, seed in grid.runs():
        assert {f"compare_{name}_seed_{seed}", f"evaluate_compare_{name}_seed_{seed}"} <= set(names)
    assert names[-1] == "report" and set(steps[-1].needs) <= set(names)
    assert all(need in names[: names.index(step.name)] for step in steps for need in step.needs)
    command = {step.name: step.command for step in steps}
    for name in grid.methods:
        words = command[f"evaluate_compare_{name}_seed_0"]
        label = "top_k_tuned" if name.startswith("top_k_") else name
        assert words[words.index("--name") + 1] == label


def test_some_methods_only():
    some = Grid.read(repository() / GRID, (0,), ["gemoe", "remoe"])
    assert list(some.methods) == ["remoe", "gemoe"] and list(some.budgets) == ["gemoe"]
    with pytest.raises(ConfigError, match="--methods nothing: not in .*; there are: top_k_8"):
        Grid.read(repository() / GRID, (0,), ["nothing"])


def test_list_prints_and_runs_nothing():
    words = ["-m", "experiments.compare", "--list", "--methods", "gemoe", "--seeds", "0"]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=repository(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1].startswith("python -m experiments.compare --report")
    assert sum("launch/train.py" in line for line in lines) == 1, "gemoe"
    assert any("--mean-k 3 4 5 6 7" in line for line in lines)
