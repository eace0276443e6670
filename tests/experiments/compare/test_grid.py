"""Grids: what ships is valid and fair, and what is not is refused in one line."""

from __future__ import annotations

from copy import deepcopy

import pytest
import yaml

from experiments.compare.__main__ import GRID as SHIPPED
from experiments.compare.grid import overrides, read_grid
from gemoe_ds.config import load_config
from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import Router
from tests.experiments.compare.planted import GRID
from tests.helpers import repository

OURS = {"optim.lr", "optim.predictor_lr", "optim.warmup_steps"}  # what trials may choose


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    monkeypatch.chdir(repository())


@pytest.fixture(scope="module")
def shipped():
    return read_grid(repository() / SHIPPED)


# But for evolve, which has no k to compare. A newcomer's router is in it when its author says so.
FIELD = """
top_k gemoe threshold score ratio mass entropy alloc_moe remoe adamoe moepp dynmoe ada_k top_p zeda
beam dtop_p ltdr evomoe""".split()


def test_every_method_is_in_it(shipped):
    compared = {row.router["name"] for row in shipped.rows.values()}
    assert compared >= set(FIELD) and compared <= set(Router.names())


def test_all_rows_have_as_many_trials_and_two_values_on_captions(shipped):
    for name, row in shipped.rows.items():
        assert len(row.trials) == (shipped.trials_each if row.trains else 0), name
        if row.trains and row.knob:
            assert len(row.captions) >= 2 and len(row.quick) >= 2, name
        different = {str(trial) for trial in row.trials}
        assert len(different) == len(row.trials), f"{name}: two trials are the same"


def test_rows_differ_in_router_and_rates_alone(shipped):
    base = load_config(shipped.recipe, [f"{k}={v}" for k, v in shipped.settings.items()])
    for row in shipped.rows.values():
        for setting in row.trials or [{}]:
            made = load_config(shipped.recipe, overrides(shipped, row, row.values[0], setting))
            tree, reference = made.model_dump(), base.model_dump()
            reference["model"]["router"] = tree["model"]["router"]
            for key in OURS:
                name = key.removeprefix("optim.")
                reference["optim"][name] = tree["optim"][name]
            reference["train"] |= {k: v for k, v in tree["train"].items() if k == "distill"}
            assert tree == reference


def changed(**values):
    tree = deepcopy(GRID)
    for path, value in values.items():
        *above, last = path.split("__")
        place = tree
        for key in above:
            place = place[key]
        place[last] = value
    return tree


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (
            changed(ours="nobody"),
            "'nobody' is not among the rows: static, tuned, score, gemoe, free",
        ),
        (changed(control="tuned 7"), "'tuned 7' names no training"),
        (changed(control="static 8"), "'static 8' names no training"),
        (changed(rows__gemoe__trials=[{}]), "row gemoe has 1 trials; every row that trains has 2"),
        (changed(rows__score__trials=[{}]), "nothing is trained"),
        (changed(rows__score__gates="gemoe 3"), "'gemoe 3' names no training"),
        (changed(rows__gemoe__router={"name": "gemo"}), "router 'gemo': there are ada_k, "),
        (changed(rows__gemoe__router={"name": "remoe"}), "router 'remoe' has no dial: name a knob"),
        (changed(rows__tuned__knob={"k": [8], "x": [1]}), "knob: one, not several"),
        (
            changed(rows__tuned__captions=[7]),
            r"captions and quick: \[7\] are not among \[8, 4, 2\]",
        ),
        (changed(rows__tuned__knob={"kk": [8, 4, 2]}), "row tuned: .*kk"),
        (changed(rows__gemoe__trials=[{"optim.rate": 1}] * 2), "row gemoe: .*optim.rate"),
        (changed(full__backbones=["third"]), r"backbones \['third'\] are not among"),
        (changed(rows__gemoe__color=1), "rows.gemoe.color: Extra inputs"),
        ([], "Input should be"),
        ("a: [", "is no YAML"),
    ],
)
def test_what_is_no_grid_is_refused_in_one_line(tmp_path, tree, expected):
    path = tmp_path / "grid.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree, sort_keys=False))
    with pytest.raises(ConfigError, match=expected) as caught:
        read_grid(path)
    assert str(caught.value).startswith(f"--grid {path}") and len(str(caught.value)) < 400


def test_a_grid_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_grid(tmp_path / "none.yaml")
