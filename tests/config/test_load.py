"""The recipe: what it becomes, and that every mistake is one line that names the way out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from gemoe_ds.config import RunConfig, deepspeed_config, load_config, parse_cli
from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import Router
from gemoe_ds.routers.gemoe import GeMoERouter
from tests.helpers import repository

MINIMAL = """
output_dir: out
model:
  backbone: {name: tiny}
  checkpoint: base
  router: {name: gemoe, k_high: 4}
data: {train_path: train, tokenizer: tokenizer}
optim: {lr: 1e-3}
train: {steps: 10, micro_batch_size: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def load(path: Path, *overrides: str) -> RunConfig:
    return load_config(path, overrides)


def refusal(path: Path, *overrides: str) -> str:
    """The message of the ConfigError; it must be one line."""
    with pytest.raises(ConfigError) as caught:
        load(path, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What a recipe becomes


def test_minimal_recipe_has_typed_options_and_defaults(recipe: Path) -> None:
    config = load(recipe)
    assert config.model.router.name == "gemoe"
    assert isinstance(config.model.router.config, GeMoERouter.Config)
    assert config.model.router.config.k_high == 4
    assert config.model.router.router_class is GeMoERouter
    assert config.optim.lr == 1e-3  # YAML 1.1 alone reads 1e-3 as a string
    assert config.parallel.ep_size == 1
    assert config.resume == "none"


def test_tree_is_frozen(recipe: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(recipe).train.steps = 3  # type: ignore[misc]


def test_overrides_are_yaml_and_the_last_one_wins(recipe: Path) -> None:
    config = load(
        recipe,
        "train.steps=7",
        "train.steps=8",
        "optim.betas=[0.8, 0.9]",
        "optim.max_grad_norm=null",
        "model.activation_checkpointing=true",
        "data.validation_path=held=out",
    )
    assert config.train.steps == 8
    assert config.optim.betas == (0.8, 0.9)
    assert config.optim.max_grad_norm is None
    assert config.model.activation_checkpointing is True
    assert config.data.validation_path == "held=out"


@pytest.mark.parametrize("order", [1, -1])
def test_another_name_drops_the_old_options_whatever_the_order(recipe: Path, order: int) -> None:
    config = load(recipe, *["model.router.name=top_k", "model.router.k=5"][::order])
    defaults = Router.named("top_k").Config(k=5).model_dump()
    assert config.model.router.flat() == {"name": "top_k", **defaults}


def test_extends_merges_by_key(recipe: Path) -> None:
    child = recipe.parent / "sub" / "child.yaml"
    child.parent.mkdir()
    child.write_text("extends: ../recipe.yaml\nmodel: {router: {k_high: 6}}\ntrain: {steps: 3}\n")
    config = load(child)
    assert config.model.router.flat()["k_high"] == 6
    assert (config.train.steps, config.train.micro_batch_size) == (3, 2)
    child.write_text("extends: ../recipe.yaml\nmodel: {router: {name: top_k}}\n")
    assert "k_high" not in load(child).model.router.flat()


def test_extends_only_once(recipe: Path) -> None:
    (recipe.parent / "b.yaml").write_text("extends: recipe.yaml\n")
    (recipe.parent / "c.yaml").write_text("extends: b.yaml\n")
    assert "one level" in refusal(recipe.parent / "c.yaml")


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


# Mistakes


def test_unknown_key_names_its_path_the_valid_ones_and_the_nearest(recipe: Path) -> None:
    message = refusal(recipe, "model.router.k_hihg=3")
    assert message.startswith("model.router.k_hihg: no such option; gemoe has k_low, k_high, ")
    assert message.endswith("(did you mean k_high?)")
    message = refusal(recipe, "optim.learning_rate=1")
    assert message.startswith("optim.learning_rate: no such option; optim has lr, ")
    message = refusal(recipe, "sede=1")
    assert message.startswith("sede: no such option; a recipe has seed, ")
    assert message.endswith("(did you mean seed?)")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=-1", "optim.lr=-1: should be greater than 0"),
        ("optim.lr=.nan", "optim.lr=NaN: should be a finite number"),
        ("optim.lr=fast", 'optim.lr="fast": should be a number'),
        ("optim.betas=[0.9, 1.0]", "optim.betas.1=1.0: should be less than 1"),
        ("train.steps=2.5", "train.steps=2.5: should be a whole number"),
        ("train.steps=0", "train.steps=0: should be greater than or equal to 1"),
        ("model.dtype=fp8", "model.dtype=\"fp8\": should be 'float32' or 'bfloat16'"),
        ("train=3", "train=3: should be a mapping of options"),
        ("model.router.k_low=-1", "model.router.k_low=-1: should be greater than or equal to 0"),
        ("model.router=gemoe", "model.router: needs a mapping with a name; known names: "),
        ("optim.warmup_steps=11", "optim.warmup_steps=11 exceeds train.steps=10"),
        ("model.checkpoint=null", "model.checkpoint: model.trainable=routers starts from"),
        ("train.steps", "override 'train.steps': write it as key.path=value"),
        ("=3", "override '=3': write it as key.path=value"),
        ("optim=[1", "override 'optim=[1': not a YAML value: expected ',' or ']'"),
    ],
)
def test_wrong_value_is_one_line_with_key_value_and_rule(
    recipe: Path, override: str, message: str
) -> None:
    assert refusal(recipe, override).startswith(message)


def test_unknown_router_and_backbone_list_the_known_ones(recipe: Path) -> None:
    message = refusal(recipe, "model.router.name=gemeo")
    assert message.startswith("model.router: router 'gemeo' is not known; known: ")
    assert "top_k" in message
    assert "tiny" in refusal(recipe, "model.backbone.name=huge")


def test_missing_keys_and_many_mistakes_are_one_line(recipe: Path) -> None:
    recipe.write_text("output_dir: out\n")
    message = refusal(recipe)
    assert message.startswith("model: missing; set it in the recipe or as model=VALUE; data: ")
    assert message.endswith("and 1 more")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "key 'seed' stands twice (line 2, column 1)"),
        ("model: {a: 1, a: 2}\n", "key 'a' stands twice"),
        ("model: [\n", "not valid YAML"),
        ("- 1\n", "a recipe is a mapping of options, got [1]"),
        ("", "is empty"),
        ("extends: 3\n", "extends must be the path of a recipe"),
        ("extends: nowhere.yaml\n", "extends=nowhere.yaml: no such file or folder (looked in "),
    ],
)
def test_unreadable_recipe_names_file_and_reason(recipe: Path, text: str, message: str) -> None:
    recipe.write_text(text)
    assert message in refusal(recipe)


def test_absent_recipe(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.yaml")


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


# The command line


def test_flags_and_overrides_in_any_order(recipe: Path) -> None:
    config, flags = parse_cli(
        ["--local_rank=1", str(recipe), "train.steps=3", "--dry-run", "seed=5", "--resume", "auto"]
        + ["--deepspeed", "other: file.json"]
    )
    assert (config.train.steps, config.seed, config.resume) == (3, 5, "auto")
    assert config.deepspeed == "other: file.json"
    assert (flags.recipe, flags.dry_run, flags.print_config) == (str(recipe), True, False)
    config, flags = parse_cli(
        [str(recipe), "--deepspeed_config", "x.json", "--print-config", "--local-rank", "0"]
    )
    assert config.deepspeed == "x.json"
    assert flags.print_config and not flags.dry_run


@pytest.mark.parametrize("arguments", [[], ["--nope"], ["--dry"], ["--resume"]])
def test_wrong_command_line_is_a_config_error(recipe: Path, arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="--help lists"):
        parse_cli([str(recipe), *arguments] if arguments else [])


def test_help_lists_every_option_of_every_router(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_cli(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "optim.max_grad_norm                float | null; default 1.0" in text
    for name in Router.names():
        for key in Router.named(name).Config.model_fields:
            assert f"model.router.{key} " in text


def test_a_bad_recipe_ends_a_program_with_one_line_and_code_2(recipe: Path) -> None:
    program = (
        "import sys\n"
        "from gemoe_ds.config import parse_cli\n"
        "from gemoe_ds.errors import exit_on_error\n"
        "with exit_on_error():\n"
        "    parse_cli(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(recipe), "optim.lr=0"],
        cwd=repository(),
        env=os.environ | {"PYTHONPATH": str(repository())},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: optim.lr=0: should be greater than 0\n"


# The DeepSpeed file


def resolved(recipe: Path, options: Any, *overrides: str, world_size: int = 2) -> dict[str, Any]:
    file = recipe.parent / "ds.json"
    file.write_text(options if isinstance(options, str) else json.dumps(options))
    config = load(recipe, f"deepspeed={file}", *overrides)
    return deepspeed_config(config, world_size, hidden_size=16)


ZERO_2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize("extra", [{}, {"train_batch_size": "auto", "gradient_clipping": "auto"}])
def test_batch_sizes_and_clipping_come_from_the_recipe(recipe: Path, extra: dict[str, Any]) -> None:
    assert resolved(recipe, ZERO_2 | extra, "train.gradient_accumulation_steps=3") == {
        "zero_optimization": {"stage": 2},
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "train_batch_size": 12,
        "gradient_clipping": 1.0,
    }
    assert resolved(recipe, ZERO_2, "optim.max_grad_norm=null")["gradient_clipping"] == 0.0


def test_other_keys_pass_and_auto_inside_is_filled_in(recipe: Path) -> None:
    options = {
        "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto", "overlap_comm": False},
        "comms_logger": {"enabled": True},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999]}},
    }
    result = resolved(recipe, options)
    assert result["zero_optimization"] == {
        "stage": 1,
        "overlap_comm": False,
        "reduce_bucket_size": 16**2,  # as Hugging Face has it
    }
    assert result["comms_logger"] == {"enabled": True}
    assert not result.keys() & {"bf16", "fp16", "optimizer"}  # the model's and the recipe's own


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"train_micro_batch_size_per_gpu": 4},
            "train_micro_batch_size_per_gpu=4 contradicts train.micro_batch_size=2",
        ),
        ({"gradient_accumulation_steps": 2}, "contradicts train.gradient_accumulation_steps=1"),
        ({"train_batch_size": 2}, r"train_batch_size=2 contradicts .*=4"),
        ({"gradient_clipping": 0.5}, "contradicts optim.max_grad_norm=1.0"),
        ({"bf16": {"enabled": False}}, "bf16.enabled=false contradicts model.dtype=bfloat16"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=true contradicts model.dtype"),
        ({"bf16": True}, "bf16=true: should be an object"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type=Lamb contradicts"),
        ({"optimizer": {"params": {"lr": 1}}}, "optimizer.params.lr=1 contradicts optim.lr=0.001"),
        ({"optimizer": {"params": {"momentum": 1}}}, "optimizer.params.momentum: the recipe sets"),
        ({"scheduler": {"type": "WarmupLR"}}, "WarmupLR contradicts optim.schedule=cosine"),
        ({"expert_parallel": {"enabled": True}}, "set parallel.ep_size in the recipe"),
        ({"zero_optimization": {"stage": 4}}, "stage=4: should be one of 0, 1, 2, 3"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param needs stage 3",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer.device=nvme is not supported",
        ),
    ],
)
def test_contradictions_are_refused(recipe: Path, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolved(recipe, ZERO_2 | extra)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "a JSON object")])
def test_damaged_deepspeed_file(recipe: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(recipe, text)


def test_absent_deepspeed_file(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="^deepspeed=absent.json: cannot read it"):
        deepspeed_config(load(recipe, "deepspeed=absent.json"), 1, 16)


def test_zero_stage(recipe: Path) -> None:
    file = recipe.parent / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert load(recipe, f"deepspeed={file}").zero_stage == 1


@pytest.mark.parametrize(
    "file", sorted((repository() / "ds_configs").glob("*.json")), ids=lambda path: path.name
)
def test_shipped_files_fit_any_recipe(recipe: Path, file: Path) -> None:
    result = resolved(recipe, file.read_text(), "model.dtype=float32")
    assert file.name.startswith(f"zero{result['zero_optimization']['stage']}")
    assert "offload" not in file.name or "offload_optimizer" in result["zero_optimization"]


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
    with pytest.raises(ConfigError, match="model.dtype.*loss scaling is not proven; use bfloat16"):
        load(recipe, "model.dtype=float16")
