"""The tree of a run: frozen, written and read back, checked against ranks and paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import Router
from gemoe_ds.routers.gemoe import GeMoERouter
from tests.config.minimal import load
from tests.train.resuming import make_config


def test_tree_is_frozen(recipe: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(recipe).train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.backbone.num_experts=16", "optim.eps=1e-12", "optim.max_grad_norm=null"],
        ["model.checkpoint=null", "model.trainable=all", "model.router={name: top_k, k: 3}"],
    ],
)
def test_resolved_recipe_loads_to_the_same_run(recipe: Path, overrides: list[str]) -> None:
    config = load(recipe, *overrides)
    resolved = recipe.parent / "resolved.yaml"
    resolved.write_text(config.dump_yaml())
    again = load(resolved)
    assert again.model_dump() == config.model_dump()
    assert again.dump_yaml() == config.dump_yaml()


def test_resolved_recipe_has_fresh_shapes_and_leaves_those_of_a_checkpoint_to_it(
    recipe: Path,
) -> None:
    stored = yaml.safe_load(load(recipe, "model.backbone.num_experts=16").dump_yaml())
    assert stored["model"]["backbone"] == {"name": "tiny", "num_experts": 16}
    fresh = yaml.safe_load(load(recipe, "model.checkpoint=null", "model.trainable=all").dump_yaml())
    assert fresh["model"]["backbone"]["num_experts"] == 64


def test_world_size_must_be_a_multiple_of_ep_size(recipe: Path) -> None:
    config = load(recipe, "parallel.ep_size=4")
    config.validate_world(8)
    with pytest.raises(ConfigError, match=r"ep_size=4 does not divide the 6 ranks.*1, 2, 3, 6"):
        config.validate_world(6)


def test_check_paths_names_the_first_missing_one(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    file = recipe.parent / "ds.json"
    config = load(recipe, "deepspeed=ds.json", "data.validation_path=held_out")
    for key, name in (
        ("model.checkpoint", "base"),
        ("data.train_path", "train"),
        ("data.validation_path", "held_out"),
        ("data.tokenizer", "tokenizer"),
    ):
        with pytest.raises(ConfigError, match=f"^{key}={name}: no such file or folder"):
            config.check_paths()
        (recipe.parent / name).mkdir()
    file.write_text("{}")
    config.check_paths()
    with pytest.raises(ConfigError, match="^resume=gone"):
        load(recipe, "deepspeed=ds.json", "resume=gone").check_paths()
    with pytest.raises(ConfigError, match="^output_dir=ds.json: is a file"):
        load(recipe, "deepspeed=ds.json", "output_dir=ds.json").check_paths()


def test_zero_stage(recipe: Path) -> None:
    file = recipe.parent / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert load(recipe, f"deepspeed={file}").zero_stage == 1


def test_global_batch_gives_the_accumulation(recipe: Path) -> None:
    config = load(recipe, "train.global_batch_size=16", "train.micro_batch_size=2")
    assert [config.accumulation_steps(ranks) for ranks in (1, 2, 8)] == [8, 4, 1]
    assert load(recipe, "train.gradient_accumulation_steps=3").accumulation_steps(4) == 3
    assert load(recipe).accumulation_steps(4) == 1
    with pytest.raises(
        ConfigError, match=r"train.global_batch_size=16 is not a multiple .* 2 \* 3"
    ):
        config.validate_world(3)
    with pytest.raises(ConfigError, match="set only one of them"):
        load(recipe, "train.global_batch_size=16", "train.gradient_accumulation_steps=2")


def test_float16_is_refused_with_the_reason(recipe: Path) -> None:
    with pytest.raises(
        ConfigError, match="model.dtype.*loss must be scaled.*registers; use bfloat16"
    ):
        load(recipe, "model.dtype=float16")


def test_a_router_registered_later_is_a_choice_at_once(recipe: Path) -> None:
    class Later(Router):
        name = "registered_in_a_test"

        class Config(GeMoERouter.Config):
            extra: int = 3

    try:
        config = load(recipe, "model.router={name: registered_in_a_test, extra: 4}")
        assert config.model.router.router_class is Later
        assert config.model.router.flat()["extra"] == 4
    finally:
        del Router._family["registered_in_a_test"]


NOWHERE = dict.fromkeys(("root", "hf", "tokenizer", "data"), Path("unused"))


HELD_OUT = {"data__validation_path": "held out"}


def config_of(**changes):
    return make_config(NOWHERE, Path("unused"), **changes)


def test_settings_of_evaluation_that_fit_together():
    config = config_of(
        **HELD_OUT,
        train__eval_every=5,
        train__early_stop=3,
        train__hooks=["a.b:C"],
        checkpoint__keep_best="validation/accuracy",
        checkpoint__keep_best_mode="min",
    )
    assert config.train.hooks == ("a.b:C",)
    config_of(checkpoint__keep_best="my/metric", train__early_stop=1, train__hooks=["a:B"])
    config_of(**HELD_OUT)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train__eval_every": 5}, "train.eval_every=5: needs data.validation_path"),
        (
            HELD_OUT | {"train__early_stop": 3},
            "train.early_stop=3: nothing is evaluated; set train.eval_every",
        ),
        (
            HELD_OUT | {"checkpoint__keep_best": "validation/loss"},
            "checkpoint.keep_best=validation/loss: nothing is evaluated",
        ),
        ({"checkpoint__keep_best_mode": "max"}, "goes with checkpoint.keep_best=METRIC"),
        ({"checkpoint__keep_best": ""}, "checkpoint.keep_best"),
        ({"checkpoint__keep_best": True}, "checkpoint.keep_best"),
        ({"train__eval_every": -1}, "train.eval_every=-1"),
        ({"train__early_stop": True}, "train.early_stop"),
        ({"train__hooks": "a:B"}, r"train.hooks=.*should be a list, such as .*MyHook"),
        ({"monitor__wandb": True}, "monitor.wandb=true: should be text"),
        ({"monitor__wandb": ""}, "monitor.wandb"),
    ],
)
def test_settings_of_evaluation_that_do_not_are_one_line(changes, words):
    with pytest.raises(ConfigError, match=words) as refusal:
        config_of(**changes)
    assert "\n" not in str(refusal.value)
