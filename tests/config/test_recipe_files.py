"""Recipes and overrides as people write them: the right value, or one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemoe_ds.config import load_config
from gemoe_ds.errors import ConfigError
from tests.helpers import repository

RECIPE = repository() / "launch/recipes/trial.yaml"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("? [a, b]\n: 1", "a list or mapping is none"),
        ("1: 2", "'1' is none"),
        ("train: {steps: 1,000}", "'000' is none"),
        ("on: 2", "'on' is none"),
        ("seed: !!int abc", "not valid YAML"),
        ("train: {steps: " + "9" * 5000 + "}", "not valid YAML"),
        ("train: {steps: 99999999999999999999}", "is too large"),
        ("seed: 010", "010 is another number"),
        ("seed: 1:30", "1:30 is another number"),
        ("train: {steps: yes}", "train.steps: true is no number"),
        ("optim: {max_grad_norm: off}", "give a number, or null"),
        ("output_dir: ${oc.env:HOME}/run", "is not filled in here"),
        ("output_dir: $HOME/run", "is not filled in here"),
        ("output_dir: ''", "is no folder's name"),
        ("train: null", "train=null: should be a mapping of options; train has steps,"),
        ("optim: {betas: [0.9, 0.99, 0.999]}", "should be a list of 2"),
        ("optim: {betas: 0.9}", "should be a list, such as"),
        ("train: {steps: 12.5}", "train.steps=12.5: should be a whole number"),
        ("monitor: {sample_log: perhaps}", 'monitor.sample_log="perhaps": should be true or false'),
        ("train.steps: 5", "nest the mappings"),
        ("model: {router: {name: gemeo}}", "did you mean gemoe?"),
    ],
)
def test_what_is_no_recipe_gets_one_line(tmp_path: Path, text: str, said: str) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text and f"extends: {_base(tmp_path)}\n{text}\n")
    with pytest.raises(ConfigError, match=".") as refused:
        load_config(recipe)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "mine.yaml").write_bytes("output_dir: B\u00fccher".encode(encoding))
    with pytest.raises(ConfigError, match="no text in UTF-8"):
        load_config(tmp_path / "mine.yaml")


def test_marks_line_ends_dates_and_home_are_read(tmp_path: Path) -> None:
    text = f"\ufeffextends: {_base(tmp_path)}\r\noutput_dir: 2024-13-45\r\n"
    (tmp_path / "mine.yaml").write_bytes(text.encode())
    assert load_config(tmp_path / "mine.yaml").output_dir == "2024-13-45"
    home = load_config(tmp_path / "mine.yaml", ["output_dir=~/run"]).output_dir
    assert home == str(Path.home() / "run")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=", "has no value"),
        ("train.steps =30", "without spaces around ="),
        ("output_dir=${root}/x", "is not filled in here"),
    ],
)
def test_overrides_with_spaces_and_placeholders(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(RECIPE, [override])


def _base(folder: Path) -> Path:
    """A recipe that extends none."""
    path = folder / "base.yaml"
    path.write_text(load_config(RECIPE).dump_yaml())
    return path
