"""Every recipe that ships is valid, and writes and reads where the demo expects it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemoe_ds.config import deepspeed_config, load_config
from tests.helpers import repository

RECIPES = sorted((repository() / "launch" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository())
    config = load_config(path)
    config.validate_world(2)
    assert deepspeed_config(config, 2)["zero_optimization"]["stage"] == config.zero_stage
    assert config.output_dir.startswith("runs/")  # git ignores it


def test_recipes_are_there() -> None:
    assert {path.stem for path in RECIPES} >= {
        "demo_pretrain",
        "demo_gemoe",
        "demo_top_8",
        "demo_top_5",
    }


def test_the_demo_compares_like_with_like() -> None:
    """The tuned baselines and GeMoE differ in the router and in nothing else."""
    recipes = [
        load_config(p) for p in RECIPES if p.stem in ("demo_gemoe", "demo_top_8", "demo_top_5")
    ]
    assert len(recipes) == 3
    rest = []
    for config in recipes:
        options = config.model_dump()
        options["model"].pop("router")
        options.pop("output_dir")
        rest.append(options)
    assert rest[0] == rest[1] == rest[2]
    assert {config.model.router.name for config in recipes} == {"gemoe", "top_k"}
    assert len({config.output_dir for config in recipes}) == 3
    pretrain, anneal = (
        load_config(repository() / "launch" / "recipes" / f"demo_{name}.yaml")
        for name in ("pretrain", "anneal")
    )
    assert anneal.model.checkpoint == f"{pretrain.output_dir}/hf"
    assert rest[0]["model"]["checkpoint"] == f"{anneal.output_dir}/hf"
    assert rest[0]["data"] == anneal.model_dump()["data"] == pretrain.model_dump()["data"]
