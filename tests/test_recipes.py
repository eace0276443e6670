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
    ranks = {"8_gpus": 8, "4_nodes": 32}.get("_".join(path.stem.split("_")[-2:]), 2)
    config.validate_world(ranks)
    assert deepspeed_config(config, ranks, 16)["zero_optimization"]["stage"] == config.zero_stage
    assert config.output_dir.startswith("runs/")  # git ignores it


def test_recipes_are_there() -> None:
    assert {path.stem for path in RECIPES} >= {
        "demo_pretrain",
        "demo_gemoe",
        "demo_top_8",
        "demo_top_5",
    }


FULL = [path for path in RECIPES if path.stem.endswith(("_8_gpus", "_4_nodes"))]


def test_every_backbone_has_the_paper_s_recipe_for_one_node_and_for_four() -> None:
    """GeMoE, Table 7: the same run on both, whatever the machines hold at a time."""
    by_backbone: dict[str, list] = {}
    for path in FULL:
        config = load_config(path)
        assert (config.optim.lr, config.optim.schedule, config.optim.weight_decay) == (
            1e-4,
            "cosine",
            0.0,
        )
        assert (config.train.steps, config.train.global_batch) == (5000, 128)
        assert (config.data.max_length, config.model.train) == (2048, "routers")
        router = config.model.router.config
        top_k = config.model.backbone.backbone_class.published_blocks()[0].routing.top_k
        assert (router.k_low, router.k_high) == (1, top_k)
        assert (router.balance_weight, router.monotonic_weight) == (0.001, 1.0)
        options = config.model_dump()
        options["train"].pop("micro_batch")
        by_backbone.setdefault(config.model.backbone.name, []).append(options)
    assert set(by_backbone) == {"olmoe", "molmoe", "deepseek_vl2", "qwen3_vl_moe"}
    assert all(one == four for one, four in by_backbone.values())


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
