"""A run that goes on says what it does otherwise, and keeps every recipe that it had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemoe_ds.checkpoint.manifest import Checkpoint
from gemoe_ds.train.recipe_changes import changes, described, keep_recipes, model_changes
from tests.helpers import repository, run_ranks
from tests.train.resuming import make_config, one_group, write_setting


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("changes"))


def found_of(config, folder: Path, **manifest: object) -> Checkpoint:
    written = {"recipe": described(config), "written by": {"ranks": 2}} | manifest
    return Checkpoint(folder, 3, 3, json.loads(json.dumps(written)))


def rows(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()[1:]]


@pytest.mark.parametrize(
    "change, row",
    [
        ({"optim__lr": 0.02}, "optim.lr 0.01 -> 0.02"),
        ({"optim__betas": (0.9, 0.95)}, "optim.betas [0.9, 0.999] -> [0.9, 0.95]"),
        ({"optim__max_grad_norm": None}, "optim.max_grad_norm 1.0 -> null"),
        ({"optim__schedule": "constant"}, "optim.schedule cosine -> constant"),
        ({"train__steps": 9}, "train.steps 6 -> 9"),
        ({"data__max_length": 64}, "data.max_length 2048 -> 64"),
    ],
)
def test_each_option_that_differs_is_named_with_both_values(setting, tmp_path, change, row):
    found = found_of(make_config(setting, tmp_path), tmp_path / "checkpoints/step-000003")
    text = changes(found, make_config(setting, tmp_path, **change), 2)
    assert text.startswith("the recipe has changed since step 3:") and rows(text) == [row]


def test_an_option_that_is_gone_is_named_too(setting, tmp_path):
    config = make_config(setting, tmp_path)
    found = found_of(config, tmp_path, recipe=described(config) | {"former": {"option": 3}})
    assert rows(changes(found, config, 2)) == ["former.option 3 -> not set"]


def test_an_option_that_is_new_counts_only_if_it_is_set(setting, tmp_path):
    config = make_config(setting, tmp_path)
    recipe = described(config)
    del recipe["train"]["max_skipped_steps"]
    found = found_of(config, tmp_path, recipe=recipe)
    assert changes(found, config, 2) == ""
    again = make_config(setting, tmp_path, train__max_skipped_steps=3)
    assert rows(changes(found, again, 2)) == ["train.max_skipped_steps not set -> 3"]


def test_an_evaluation_says_what_its_model_has_otherwise(setting, tmp_path):
    """And nothing of what is not the model's."""
    config = make_config(setting, tmp_path)
    found = found_of(config, tmp_path)
    assert model_changes(found, make_config(setting, tmp_path / "moved", optim__lr=1.0)) == ""
    here = {"model__checkpoint": "elsewhere", "model__dtype": "bfloat16"}
    other = make_config(setting, tmp_path, model__router__k_high=3, **here)
    assert sorted(rows(model_changes(found, other))) == [
        f"model.checkpoint {config.model.checkpoint} -> elsewhere",
        "model.dtype float32 -> bfloat16",
        "model.router.k_high null -> 3",
    ]
    assert model_changes(Checkpoint(tmp_path / "no/checkpoints", 1, 1, {}), other) == "", "unknown"


def test_nothing_changed_is_silent(setting, tmp_path):
    config = make_config(setting, tmp_path)
    again = make_config(setting, tmp_path / "moved", resume="auto")
    assert changes(found_of(config, tmp_path), again, 2) == ""
    assert changes(Checkpoint(tmp_path / "checkpoints/step-1", 1, 1, {}), again, 2) == "", "unknown"


def test_ranks_and_what_is_in_the_deepspeed_file(setting, tmp_path):
    path = tmp_path / "ds.json"
    options = json.loads((repository() / "ds_configs/zero2.json").read_text())
    path.write_text(json.dumps(options))
    config = make_config(setting, tmp_path, deepspeed=str(path))
    found = found_of(config, tmp_path)
    options["zero_optimization"]["stage"] = 1
    path.write_text(json.dumps(options))
    config = make_config(setting, tmp_path, deepspeed=str(path))  # which has read it anew
    stage = "DeepSpeed's file.zero_optimization.stage 2 -> 1"
    assert rows(changes(found, config, 4)) == [stage, "ranks 2 -> 4"]


def test_a_checkpoint_of_an_older_version_has_its_recipe_beside_it(setting, tmp_path):
    config = make_config(setting, tmp_path)
    (tmp_path / "config.yaml").write_text(config.dump_yaml())
    found = Checkpoint(tmp_path / "checkpoints/step-000003", 3, 3, {})
    assert changes(found, config, 2) == ""
    text = changes(found, make_config(setting, tmp_path, optim__lr=1.0), 2)
    assert rows(text) == ["optim.lr 0.01 -> 1.0"]


def test_every_recipe_stays(setting, tmp_path):
    for lr, step in ((1.0, 0), (1.0, 3), (2.0, 3), (3.0, 3), (4.0, 5)):
        resume = "auto" if step else "none"
        keep_recipes(tmp_path, make_config(setting, tmp_path, optim__lr=lr, resume=resume), step)
    rates = {
        path.name: next(x.strip() for x in path.read_text().splitlines() if " lr:" in x)
        for path in tmp_path.glob("config*.yaml")
    }
    assert rates == {
        "config-until-step-000003.yaml": "lr: 1.0",
        "config-until-step-000003-2.yaml": "lr: 2.0",
        "config-until-step-000005.yaml": "lr: 3.0",
        "config.yaml": "lr: 4.0",
    }


def train_aloud(rank: int, configs: list) -> list[str]:
    """What the first rank prints in each run."""
    import contextlib
    import io

    import gemoe_ds.train.run as module

    heard = []
    with one_group(module):
        for config in configs:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                module.train(config)
            heard.append(said.getvalue())
    return heard


def test_a_resumed_run_says_it_once(setting, tmp_path):
    options = {"parallel__ep_size": 1, "optim__warmup_steps": 0}
    short = make_config(setting, tmp_path, train__steps=1, **options)
    longer = make_config(setting, tmp_path, train__steps=2, resume="auto", **options)
    ((_, said),) = run_ranks(train_aloud, 1, [short, longer])
    assert said.count("has changed since step 1") == 1 and said.count(" -> ") == 1
    assert "train.steps" in said and (tmp_path / "config-until-step-000001.yaml").exists()
