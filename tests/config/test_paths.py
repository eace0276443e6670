"""Paths of a recipe: the working directory, then beside the recipe, then the package."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from gemoe_ds.checkpoint.identity import run_identity
from gemoe_ds.config import RunConfig, load_config
from gemoe_ds.config.paths import CHECKOUT, Places
from gemoe_ds.errors import ConfigError
from tests.config.minimal import MINIMAL


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe in another folder, with all that it reads beside it."""
    folder = tmp_path / "recipes"
    for name in ("base", "train", "tokenizer", "tower", "held_out"):
        (folder / name).mkdir(parents=True)
    (folder / "recipe.yaml").write_text(MINIMAL)
    return folder / "recipe.yaml"


def test_the_working_directory_comes_first_then_the_recipe_s_folder(
    here: Path, recipe: Path
) -> None:
    (here / "train").mkdir()
    config = load_config(recipe)
    assert config.data.train_path == str(here / "train")
    assert config.data.tokenizer == str(recipe.parent / "tokenizer")
    assert config.model.checkpoint == str(recipe.parent / "base")
    assert config.deepspeed == str(CHECKOUT / "ds_configs/zero2.json")
    assert config.output_dir == "out", "what a run writes belongs to the working directory"
    config.check_paths()


def test_options_of_a_backbone_and_overrides_are_looked_for_alike(here: Path, recipe: Path) -> None:
    config = load_config(
        recipe,
        ["model.backbone.vision_checkpoint=tower", "data.validation_path=held_out", "resume=base"],
    )
    found = config.model.backbone.flat(only_set=True)["vision_checkpoint"]
    assert found == str(recipe.parent / "tower")
    assert config.data.validation_path == str(recipe.parent / "held_out")
    assert config.resume == str(recipe.parent / "base")
    (here / "auto").mkdir()
    assert load_config(recipe, ["resume=auto"]).resume == "auto"


def test_what_a_recipe_extends_may_bring_paths_beside_itself(here: Path, recipe: Path) -> None:
    top = here / "deeper" / "top.yaml"
    (top.parent / "train").mkdir(parents=True)
    top.write_text(f"extends: {os.path.relpath(recipe, top.parent)}\n")
    config = load_config("deeper/top.yaml")
    assert config.data.train_path == str(top.parent / "train")
    assert config.data.tokenizer == str(recipe.parent / "tokenizer")


def test_shipped_recipes_are_found_from_any_folder(here: Path) -> None:
    config = load_config("launch/recipes/trial.yaml")
    assert config.deepspeed == str(CHECKOUT / "ds_configs/zero2.json")


def test_a_run_reads_the_same_files_from_any_folder(
    here: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    config = load_config("recipe.yaml")
    written = tmp_path / "config.yaml"
    written.write_text(config.dump_yaml())
    monkeypatch.chdir(here)
    again = load_config(written)
    assert again.model_dump() == config.model_dump()
    assert Path(yaml.safe_load(again.dump_yaml())["data"]["train_path"]).is_absolute()


@pytest.mark.parametrize(
    "spelt", ["{p}/tower", "{p}/../recipes/./tower", "tower", "~/tower", "../recipes/tower"]
)
def test_a_run_s_identity_does_not_depend_on_how_a_path_is_spelt(
    here: Path, recipe: Path, spelt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(recipe.parent))

    def identity(config: RunConfig) -> dict:
        return run_identity(config, 1, "data", {"base checkpoint": "none"})

    plain = load_config(recipe, ["model.checkpoint=null", "model.trainable=all"])
    text = spelt.format(p=recipe.parent)
    towered = load_config(
        recipe,
        [
            "model.checkpoint=null",
            "model.trainable=all",
            f"model.backbone.vision_checkpoint={text}",
        ],
    )
    found = towered.model.backbone.flat()["vision_checkpoint"]
    assert found == str(recipe.parent / "tower")
    assert identity(towered) == identity(plain)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.train_path=gone",
            "data.train_path=gone: no such file or folder (looked in {h}, {r}, {root})",
        ),
        ("deepspeed=zero2.jsn", "deepspeed=zero2.jsn: no such file or folder (looked in {h}"),
        ("data.train_path=/gone/away", "data.train_path=/gone/away: no such file or folder"),
        ("resume=gone", "resume=gone: no such file or folder (looked in {h}"),
        ("data.train_path=''", "data.train_path=: is empty; give a path"),
        ("data.train_path=~nobody/x", "data.train_path=~nobody/x: no such file or folder"),
        ("data.train_path=" + "x" * 300, ": no such file or folder"),
        ("model.backbone.vision_checkpoint=gone", "model.backbone.vision_checkpoint=gone: no such"),
    ],
)
def test_what_is_nowhere_is_said_with_the_places(
    here: Path, recipe: Path, override: str, message: str
) -> None:
    config = load_config(recipe, [override])
    with pytest.raises(ConfigError) as error:
        config.check_paths()
    assert message.format(h=here, r=recipe.parent, root=CHECKOUT) in str(error.value)
    config.check_paths("optim.")  # not of these keys


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("file", "output_dir=file: is a file; give a folder"),
        ("file/run", "output_dir=file/run: {h}/file is a file; give a folder"),
        ("link", "output_dir=link: is a link to nothing; give a folder"),
        ("link/run", "output_dir=link/run: {h}/link is a link to nothing; give a folder"),
        ("run", "output_dir=run: {h}/run/checkpoints is a file; give a folder"),
        ("x" * 300, "File name too long; give another folder"),
        ("new/run", ""),
        (".", ""),
    ],
)
def test_an_output_folder_that_cannot_be(
    here: Path, recipe: Path, output: str, message: str
) -> None:
    (here / "file").touch()
    (here / "link").symlink_to("/gone/away")
    (here / "run").mkdir()
    (here / "run/checkpoints").touch()
    config = load_config(recipe, [f"output_dir={output}"])
    if not message:
        config.check_paths()
        return
    with pytest.raises(ConfigError) as error:
        config.check_paths()
    assert message.format(h=here) in str(error.value)


def test_links_stay_as_they_are(here: Path) -> None:
    (here / "step-20").mkdir()
    (here / "latest").symlink_to("step-20")
    assert Places.beside().locate("resume", "latest") == here / "latest"


def test_an_empty_recipe_and_a_word_for_a_path(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="the recipe is an empty text"):
        load_config("")
    with pytest.raises(ConfigError, match="resume=Auto: no such file .*; it may also be none or a"):
        load_config(recipe, ["resume=Auto"]).check_paths()
