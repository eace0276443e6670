"""What ships (recipes, DeepSpeed files, templates): by name, from anywhere, after one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemoe_ds.config import load_config, paths
from gemoe_ds.config.paths import PACKAGE, RECIPE, TEMPLATE, Places
from gemoe_ds.errors import ConfigError
from gemoe_ds.registry import Reads

DEEPSPEED = Reads(shipped="ds_configs")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory of a machine without a checkout."""
    monkeypatch.setattr(paths, "CHECKOUT", None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("reads", "text", "file"),
    [
        (RECIPE, "olmoe_gemoe_8_gpus", "recipes/olmoe_gemoe_8_gpus.yaml"),
        (RECIPE, "olmoe_gemoe_8_gpus.yaml", "recipes/olmoe_gemoe_8_gpus.yaml"),
        (RECIPE, "launch/recipes/olmoe_gemoe_8_gpus.yaml", "recipes/olmoe_gemoe_8_gpus.yaml"),
        (DEEPSPEED, "zero2", "ds_configs/zero2.json"),
        (DEEPSPEED, "ds_configs/zero3_offload.json", "ds_configs/zero3_offload.json"),
        (TEMPLATE, "launch/slurm/train.sbatch", "slurm/train.sbatch"),
    ],
)
def test_by_name_or_as_in_a_checkout(reads: Reads, text: str, file: str) -> None:
    assert Places.beside().locate("", text, reads) == PACKAGE / file


def test_a_recipe_by_name_reads_all_it_needs(here: Path) -> None:
    (here / "text").mkdir()
    config = load_config("olmoe_gemoe_8_gpus", ["data.train_path=text", "deepspeed=zero1"])
    assert config.data.train_path == str(here / "text")
    assert config.deepspeed == str(PACKAGE / "ds_configs/zero1.json") and config.zero_stage == 1
    (here / "own.yaml").write_text("extends: olmoe_gemoe_8_gpus\ndeepspeed: zero3\n")
    assert load_config("own.yaml").zero_stage == 3


def test_one_s_own_files_come_first(here: Path) -> None:
    folder = here / "recipes"
    folder.mkdir()
    (folder / "mine.yaml").write_text("extends: olmoe_gemoe_8_gpus\ndeepspeed: zero2.json\n")
    (folder / "zero2.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert load_config("recipes/mine.yaml").deepspeed == str(folder / "zero2.json")
    (here / "zero2.json").write_text('{"zero_optimization": {"stage": 0}}')
    assert load_config("recipes/mine.yaml").zero_stage == 0
    (here / "olmoe_gemoe_8_gpus.yaml").write_text((folder / "mine.yaml").read_text())
    assert Places.beside().locate("", "olmoe_gemoe_8_gpus.yaml", RECIPE).parent == here


def test_a_folder_of_that_name_is_no_file(here: Path) -> None:
    (here / "zero2").mkdir()
    assert Places.beside().locate("", "zero2", DEEPSPEED) == PACKAGE / "ds_configs/zero2.json"
    (here / "runs").mkdir()
    with pytest.raises(ConfigError, match="runs: .*/runs is a folder; give a file"):
        load_config("runs")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (
            "olmoe_gemoe_8_gpu",
            "ships (did you mean olmoe_gemoe_8_gpus?): deepseek_vl2_gemoe_4_nodes,",
        ),
        ("mine.yaml", "mine.yaml: no such file or folder (looked in {here}); give a path, or the "),
        ("recipe/olmoe_gemoe_8_gpus", "no such file or folder"),
        ("/olmoe_gemoe_8_gpus.yaml", "no such file or folder; give"),
        ("../olmoe_gemoe_8_gpus", "no such file or folder"),
        ("olmoe_gemoe_8_gpus.yml", "(did you mean olmoe_gemoe_8_gpus?)"),
        ("zero2", "no such file or folder"),
    ],
)
def test_what_is_none_of_them_is_said_with_their_names(here: Path, recipe: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(recipe)
    assert words.format(here=here) in str(error.value) and "molmoe_gemoe_8_gpus" in str(error.value)


def test_a_deepspeed_file_that_is_none_is_said_with_their_names() -> None:
    config = load_config("olmoe_gemoe_8_gpus", ["deepspeed=zero4"])
    with pytest.raises(ConfigError, match=r"deepspeed=zero4: no such .*\(did you mean zero\d\?\)"):
        config.check_paths("deepspeed")
    with pytest.raises(ConfigError, match="data.train_path=zero2: no such file or folder [^;]*$"):
        load_config("olmoe_gemoe_8_gpus", ["data.train_path=zero2"]).check_paths("data.train_path")
