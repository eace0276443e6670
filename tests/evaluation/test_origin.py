"""Models and trainings that look alike by their paths are told apart by what they hold."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gemoe_ds import evaluate
from gemoe_ds.analysis.comparable import difference
from gemoe_ds.checkpoint.manifest import newest, read
from gemoe_ds.cli.evaluate import main
from gemoe_ds.errors import ConfigError
from gemoe_ds.evaluation.origin import base_digest, trained_digest, training_of
from tests.evaluation.benchmarks.hand_made import HandMade, answer
from tests.helpers import run_ranks
from tests.train.resuming import make_config, train_all, write_setting


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("origin"))


@pytest.fixture(scope="module")
def runs(setting):
    """By name: trained once, once more with other rates, and with another seed."""
    changed = {"one": {}, "other": {"optim__lr": 0.5}, "seed": {"seed": 3}}
    folders = {name: setting["root"] / name / "run" for name in changed}
    configs = [
        make_config(setting, folders[name], parallel__ep_size=1, **options)
        for name, options in changed.items()
    ]
    assert run_ranks(train_all, 1, configs) == [None]
    return folders


def test_a_base_is_told_apart_by_any_of_its_tensors(tmp_path: Path):
    def folder(name: str, last: float, config: str = "{}") -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        tensors = {"a": torch.zeros(5000), "b": torch.tensor([1.0, last])}
        save_file(tensors, tmp_path / name / "model.safetensors")
        return str(tmp_path / name)

    first = base_digest(folder("first", 2.0))
    assert first == base_digest(folder("same", 2.0))
    assert first != base_digest(folder("other", 3.0))
    assert first != base_digest(folder("described", 2.0, '{"k": 4}'))
    assert base_digest(None) is None


def test_trainings_differ_in_an_option_or_in_their_seed_alone(runs):
    found = {name: read(newest(run)) for name, run in runs.items()}
    assert len({trained_digest(one) for one in found.values()}) == 3
    options = {name: training_of(one) for name, one in found.items()}
    assert options["one"]["data"] and options["one"]["train.steps"]
    assert difference(options["one"], options["seed"]) == ""
    assert difference(options["one"], options["other"]).startswith("optim.lr (")
    assert difference(options["one"], {}) == "", "an earlier version does not say"


def test_answers_of_a_training_are_not_those_of_another(runs, tmp_path):
    """Whose checkpoints have the same names, and even the same place."""
    tasks = [HandMade("greedy", 2)]
    answer(runs["one"] / "config.yaml", tasks, "--trained", runs["one"], "--out", tmp_path)
    answer(runs["one"] / "config.yaml", tasks, "--trained", runs["one"], "--out", tmp_path)
    with pytest.raises(ConfigError, match="its checkpoint is .*step-.*, not .*step-"):
        answer(runs["one"] / "config.yaml", tasks, "--trained", runs["other"], "--out", tmp_path)
    with pytest.raises(ConfigError, match="under the name gemoe, not --name mine"):
        words = ("--trained", runs["one"], "--name", "mine", "--out", tmp_path)
        answer(runs["one"] / "config.yaml", tasks, *words)
    mode = json.loads((tmp_path / "trained/mode.json").read_text())
    assert mode["training"]["optim.lr"] and mode["trained_digest"] and mode["base_digest"]


def test_answers_of_a_training_are_not_those_of_the_next_in_its_folder(runs, tmp_path):
    run, tasks = tmp_path / "run", [HandMade("greedy", 2)]
    words = (run / "config.yaml", tasks, "--trained", run, "--out", tmp_path / "out")
    shutil.copytree(runs["one"], run)
    answer(*words)
    shutil.rmtree(run)
    shutil.copytree(runs["other"], run)
    with pytest.raises(ConfigError, match="step-000006 as it was, not .*step-000006 as it is now"):
        answer(*words)


def test_an_evaluation_is_skipped_only_for_what_it_is_of(setting, runs, tmp_path, capsys):
    recipe, out = runs["one"] / "config.yaml", str(tmp_path / "out")
    words = [str(recipe), "--data", str(setting["data"]), "--out", out]
    main([*words, "--k", "2"])
    main([*words, "--k", "2", "--skip-done"])
    assert f"done before: {out}" in capsys.readouterr().out
    for other, message in (
        (["--k", "3"], r"router .*\"k\": 2.*, not .*\"k\": 3"),
        (["--k", "2", "--limit", "3"], "limit null, not 3"),
        (["--trained", str(runs["one"])], "router "),
    ):
        with pytest.raises(SystemExit):
            main([*words, *other, "--skip-done"])
        told = capsys.readouterr().err
        assert "holds another evaluation" in told
        assert re.search(message, told), told
    main([*words, "--k", "3"])
    assert "another evaluation was there" in capsys.readouterr().out
    (tmp_path / "out/eval.json").write_text("{")
    with pytest.raises(SystemExit):
        main([*words, "--k", "3", "--skip-done"])
    assert "eval.json is damaged" in capsys.readouterr().err
    main([*words, "--k", "3"])
    assert json.loads((tmp_path / "out/eval.json").read_text())["k"] == 3


def test_options_that_would_be_dropped_are_refused(setting, runs, tmp_path):
    given = {"data": setting["data"], "out": tmp_path / "out"}
    recipe = runs["one"] / "config.yaml"
    with pytest.raises(ConfigError, match="model.router.k_low=2 would not be used: .*--k K"):
        evaluate(recipe, "model.router.k_low=2", k=2, **given)


def test_what_meets_a_budget_is_printed_as_it_is_given_again(setting, runs, tmp_path, capsys):
    given = {"data": setting["data"], "batch": 4}
    recipe = runs["one"] / "config.yaml"
    found = evaluate(
        recipe, router={"name": "score", "k_low": 1}, mean_k=2.5, out=tmp_path / "first", **given
    )
    told = capsys.readouterr().out.split("--router '")[1].split("'")[0]
    assert told.startswith("{name: score, k_low: 1, threshold: ")
    again = evaluate(recipe, router=told, out=tmp_path / "again", **given)
    (first,), (second,) = found.values(), again.values()
    assert second.mean_k_per_layer == first.mean_k_per_layer
