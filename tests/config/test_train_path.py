"""A mixture in a recipe: read, written, found, and each mistake in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gemoe_ds.config import load_config
from gemoe_ds.errors import ConfigError
from tests.config.minimal import MINIMAL, load, refusal


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    return tmp_path / "recipe.yaml"


def mixed(text: str) -> str:
    return f"data.train_path={text}"


def test_a_list_of_parts(recipe):
    parts = load(recipe, mixed("[{path: a, repeat: 0.5}, {path: b, limit: 9, name: x}]"))
    first, second = parts.data.train_path
    assert (first.repeat, first.called, second.limit, second.called) == (0.5, "a", 9, "x")
    assert load(recipe, mixed("folder")).data.train_path == "folder"
    weighted = load(recipe, mixed("[{path: a, weight: 3}, {path: b, weight: 1}]"))
    assert [part.weight for part in weighted.data.train_path] == [3, 1]


def test_it_is_found_beside_the_recipe_and_can_be_loaded_again(recipe, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    config = load(recipe, mixed("[{path: a, repeat: 2}, {path: b}]"))
    assert [part.path for part in config.data.train_path] == [
        str(tmp_path / "a"),
        str(tmp_path / "b"),
    ]
    config.check_paths("data.train_path")
    written = tmp_path / "again.yaml"
    written.write_text(config.dump_yaml())
    assert load_config(written).data == config.data
    assert yaml.safe_load(config.dump_yaml())["data"]["train_path"][0]["repeat"] == 2
    gone = load(recipe, mixed("[{path: a}, {path: gone}]"))
    with pytest.raises(
        ConfigError, match=r"data.train_path\[1\].path=gone: no such file or folder"
    ):
        gone.check_paths("data.train_path")
    assert Path(gone.data.train_path[0].path).is_absolute()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("7", "data.train_path: 7 is neither a folder nor a list such as [{path: FOLDER, repeat"),
        ("[]", "data.train_path: an empty list names no data"),
        ("[a, b]", "data.train_path: part 1 is 'a', no mapping; write the list as [{path"),
        ("[{path: a}, {repeat: 2}]", "part 2: path: missing"),
        ("[{path: a, repeats: 2}]", "part 1: repeats: no such option; has path, repeat, weight,"),
        ("[{path: a, repeats: 2}]", "(did you mean repeat?)"),
        ("[{path: a, repeat: 0}]", "part 1: repeat=0: should be greater than 0"),
        ("[{path: a, repeat: yes}]", "part 1: repeat=True: true is no number"),
        ("[{path: a, limit: 0}]", "part 1: limit=0: should be greater than or equal to 1"),
        ("[{path: a, limit: 1.5}]", "part 1: limit=1.5: should be a valid integer"),
        ("[{path: a, repeat: 2, weight: 1}]", "part 1 (a) has repeat=2 and weight=1: give passes"),
        ("[{path: a, weight: 1}, {path: b}]", "part 2 (b) has no weight, and others have one"),
        ("[{path: d/a}, {path: e/a}]", "2 parts are called 'a'; give each a name of its own"),
        ("[{path: a, name: x/y}]", "part 1: metrics cannot be called 'x/y'"),
        ("[{path: /}]", "part 1: metrics cannot be called ''"),
    ],
)
def test_a_mistake_is_one_line(recipe, text, words):
    assert words in refusal(recipe, mixed(text))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.epochs=2"], "train.steps=10 and train.epochs=2: set only one of them"),
        (
            ["train.steps=null"],
            "train.steps: missing; set it in the recipe or as train.steps=VALUE",
        ),
        (["train.steps=null", "train.epochs=0"], "train.epochs=0: should be greater than 0"),
        (["data.holdout=0.1", "data.validation_path=v"], "data.holdout=0.1 and data.validation_p"),
        (["data.holdout=1.5"], "data.holdout: 1.5 is neither a whole number nor a share below 1"),
        (["data.holdout=yes"], "neither a number nor a share such as 0.01"),
        (["train.eval_every=5"], "needs data.validation_path, a folder of held-out samples, or"),
        (["data.prefetch_bytes=0"], "data.prefetch_bytes=0: should be greater than or equal to 1"),
    ],
)
def test_epochs_and_held_out_samples(recipe, overrides, words):
    assert words in refusal(recipe, *overrides)


def test_epochs_become_steps_once_they_are_counted(recipe):
    config = load(recipe, "train.steps=null", "train.epochs=1.5", "optim.warmup_steps=9")
    assert config.known_steps is None
    counted = config.with_num_steps(12)
    assert counted.num_steps == 12 and counted.train.steps is None
    assert counted.dump_yaml() == config.dump_yaml()
    with pytest.raises(ConfigError, match="warmup_steps=9 exceeds the 8 steps of train.epochs=1.5"):
        config.with_num_steps(8)
    assert load(recipe).num_steps == 10 and load(recipe, "data.holdout=0.1", "train.eval_every=5")
