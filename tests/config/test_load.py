"""The recipe: what it becomes, and that every mistake is one line that names the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemoe_ds.config import load_config
from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import Router
from gemoe_ds.routers.gemoe import GeMoERouter
from tests.config.minimal import load, refusal
from tests.helpers import repository

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


TRIAL = repository() / "launch/recipes/trial.yaml"


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
        ("monitor: {wandb: None}", "None is a text in YAML; null says that there is none"),
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
        load_config(TRIAL, [override])


def _base(folder: Path) -> Path:
    """A recipe that extends none."""
    path = folder / "base.yaml"
    path.write_text(load_config(TRIAL).dump_yaml())
    return path
