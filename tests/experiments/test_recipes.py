"""The demo's recipes read what the one before them wrote, and compare like with like."""

from __future__ import annotations

from pathlib import Path

from experiments.backbones.__main__ import RUNS, SOURCES
from gemoe_ds.config import load_config
from tests.helpers import repository


def test_the_demo_compares_like_with_like() -> None:
    """The tuned baselines and GeMoE differ in the router and in nothing else."""
    *recipes, pretrain, anneal = (
        load_config(repository() / f"experiments/recipes/demo_{name}.yaml")
        for name in ("gemoe", "top_8", "pretrain", "anneal")
    )
    rest = []
    for config in recipes:
        options = config.model_dump()
        options["model"].pop("router")
        options.pop("output_dir")
        rest.append(options)
    assert rest[0] == rest[1]
    assert {config.model.router.name for config in recipes} == {"gemoe", "top_k"}
    assert len({config.output_dir for config in recipes}) == 2
    assert anneal.model.checkpoint == f"{pretrain.output_dir}/hf"
    used = Path(rest[0]["model"]["checkpoint"])
    assert repository() / used == repository() / "experiments/backbones/annealed"
    assert [Path(c.output_dir) for c in (pretrain, anneal)] == [
        RUNS / SOURCES["plain"],
        RUNS / SOURCES["annealed"],
    ]
    assert rest[0]["data"] == anneal.model_dump()["data"] == pretrain.model_dump()["data"]


def test_what_a_launcher_is_tried_with_is_the_demo_s_own_run() -> None:
    """The recipe that ships stands alone."""
    ours, demos = "gemoe_ds/recipes", "experiments/recipes"
    pairs = ((f"{ours}/trial", "demo_gemoe"), (f"{demos}/trial_pretrain", "demo_pretrain"))
    for trial, demo in pairs:
        first = load_config(repository() / f"{trial}.yaml").model_dump()
        second = load_config(repository() / f"{demos}/{demo}.yaml").model_dump()
        for options in (first, second):
            options["model"]["backbone"].pop("vision_checkpoint", None)
            options["optim"].pop("warmup_steps")
            options["model"].pop("checkpoint")
        for section in ("model", "optim", "parallel", "deepspeed"):
            assert first[section] == second[section], section
