"""The command line of a run: a recipe, overrides and flags; and what --help lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemoe_ds.config import parse_cli
from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import Router
from tests.config.minimal import MINIMAL


def test_flags_and_overrides_in_any_order(recipe: Path) -> None:
    config, flags = parse_cli(
        ["--local_rank=1", str(recipe), "train.steps=3", "--dry-run", "seed=5", "--resume", "auto"]
        + ["--deepspeed", "other: file.json"]
    )
    assert (config.train.steps, config.seed, config.resume) == (3, 5, "auto")
    assert config.deepspeed == "other: file.json"
    assert (flags.dry_run, flags.print_config) == (True, False)
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


@pytest.mark.parametrize(
    "words",
    [
        ["RECIPE", "--deepspeed", "--deepspeed_config", "F"],
        ["--deepspeed", "RECIPE", "--deepspeed_config=F"],
        ["--deepspeed_config", "F", "RECIPE", "--deepspeed"],
        ["RECIPE", "--deepspeed", "F", "--deepspeed_config", "F"],
        ["RECIPE", "--deepspeed", "train.steps=3", "--deepspeed_config", "F"],
        ["RECIPE", "--deepspeed=F"],
    ],
)
def test_command_lines_with_deepspeed_s_own_flags(tmp_path: Path, words: list[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(MINIMAL)
    config, _ = parse_cli([str(recipe) if word == "RECIPE" else word for word in words])
    assert config.deepspeed == "F"


def test_two_files_on_a_command_line_are_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(MINIMAL)
    with pytest.raises(ConfigError, match="--deepspeed a and --deepspeed_config b name two files"):
        parse_cli([str(recipe), "--deepspeed", "a", "--deepspeed_config", "b"])


@pytest.mark.parametrize(
    "words, said",
    [
        (["resume=F", "--resume", "auto"], "--resume auto contradicts resume=F; .*start_from=F, "),
        (["--resume=F", "--resume=auto"], "--resume F and --resume auto contr.* start_from=F, "),
        (["resume=none", "--resume", "auto"], "contradicts resume=none; give one of them$"),
        (["deepspeed=a", "--deepspeed", "b"], "--deepspeed b contradicts deepspeed=a; give one"),
    ],
)
def test_a_flag_hides_no_override_and_no_other_flag(
    recipe: Path, words: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_cli([str(recipe), *words])


def test_a_flag_may_say_what_an_override_says(recipe: Path) -> None:
    config, _ = parse_cli([str(recipe), "resume='auto'", "--resume", "auto", "--resume=auto"])
    assert config.resume == "auto"
