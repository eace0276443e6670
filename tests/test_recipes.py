"""Every recipe is valid and has room for its pictures; those of the paper say what it says."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from gemoe_ds.config import deepspeed_config, load_config
from gemoe_ds.models.deepseek_vl2.images import DeepseekVl2Images
from gemoe_ds.models.images import SquareImages
from gemoe_ds.models.molmoe.images import MolmoeImages
from tests.helpers import repository
from tests.models.qwen3_vl.small import PUBLIC, layout

FOLDERS = ("gemoe_ds/recipes", "experiments/recipes")
RECIPES = sorted(path for name in FOLDERS for path in (repository() / name).glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository())
    config = load_config(path)
    of_end = {"8_gpus": 8, "4_nodes": 32, "gpu_24gb": 1, "gpu_48gb": 1, "gemoe_laptop": 1}
    ranks = of_end.get("_".join(path.stem.split("_")[-2:]), 2)
    config.validate_world(ranks)
    assert deepspeed_config(config, ranks, 16)["zero_optimization"]["stage"] == config.zero_stage
    assert config.output_dir.startswith("runs/")  # git ignores it


LAYOUTS = {
    "olmoe": lambda options: None,
    "molmoe": lambda options: MolmoeImages(),
    "deepseek_vl2": lambda options: DeepseekVl2Images(),
    "qwen3_vl_moe": lambda options: layout(
        size=PUBLIC["size"] | {"longest_edge": options.max_pixels}
    ),
    "tiny": lambda options: SquareImages(
        options.image_size, (options.image_size // options.patch_size) ** 2, 3
    ),
}
SIDES = (1, 384, 768, 1152, 3000, 9000)
CONTEXT = 4096  # the least that any of the published models knows


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_there_is_room_for_the_largest_picture_and_an_answer(path: Path) -> None:
    config = load_config(path)
    backbone = config.model.backbone
    laid, answer = LAYOUTS[backbone.name](backbone.config), 128 if backbone.name == "tiny" else 512
    sizes = itertools.product(SIDES, SIDES)
    largest = max(laid.num_tokens(*size) for size in sizes) if laid else 0
    assert largest + answer <= config.data.max_length <= CONTEXT


FULL = [path for path in RECIPES if path.stem.endswith(("_8_gpus", "_4_nodes"))]


def test_every_backbone_has_the_paper_s_recipe_for_one_node_and_for_four() -> None:
    """GeMoE, Table 7: the same run on both, whatever the machines hold at a time."""
    by_backbone: dict[str, list] = {}
    for path in (path for path in FULL if "_gemoe_" in path.stem):
        config = load_config(path)
        assert (config.optim.lr, config.optim.schedule, config.optim.weight_decay) == (
            1e-4,
            "cosine",
            0.0,
        )
        assert (config.train.steps, config.train.global_batch_size) == (5000, 128)
        assert config.model.trainable == "routers"
        router = config.model.router.config
        top_k = config.model.backbone.backbone_class.published_blocks()[0].routing.top_k
        assert (router.k_low, router.k_high) == (1, top_k)
        assert (router.balance_weight, router.monotonic_weight) == (0.001, 1.0)
        options = config.model_dump()
        options["train"].pop("micro_batch_size")
        by_backbone.setdefault(config.model.backbone.name, []).append(options)
    assert set(by_backbone) == {"olmoe", "molmoe", "deepseek_vl2", "qwen3_vl_moe"}
    assert all(one == four for one, four in by_backbone.values())


def test_every_backbone_has_a_distilled_threshold_beside_the_paper_s_recipe() -> None:
    ours = [path for path in FULL if "_threshold_" in path.stem]
    assert len(ours) == 4
    for path in ours:
        config, paper = (
            load_config(path),
            load_config(path.with_stem(path.stem.replace("threshold", "gemoe"))),
        )
        assert config.model.router.name == "threshold"
        assert config.train.distill is not None and config.train.distill.tokens == "text"
        trees = [one.model_dump() for one in (config, paper)]
        for tree in trees:
            del tree["output_dir"], tree["model"]["router"], tree["train"]["distill"]
        assert trees[0] == trees[1]


def test_the_sizes_of_the_guide_divide_and_see_as_many_samples_as_the_recipe() -> None:
    """The table of docs/launching.md: how to train on more ranks than the recipes do."""
    text = (repository() / "docs/launching.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([\d,]+) \| `(\w+) ?(.*)` \|$", text, re.MULTILINE)
    assert [int(nodes) for nodes, *_ in rows] == [1, 4, 32, 512]
    for nodes, ranks, recipe, options in rows:
        num_ranks = int(ranks.replace(",", ""))
        assert num_ranks == 8 * int(nodes)
        path = repository() / f"gemoe_ds/recipes/{recipe}.yaml"
        config = load_config(path, options.split())
        config.validate_world(num_ranks)
        assert config.accumulation_steps(num_ranks) >= 1
        samples = config.num_steps * config.train.global_batch_size
        assert 0 <= samples - 5000 * 128 < config.train.global_batch_size
