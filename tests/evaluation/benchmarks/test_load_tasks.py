"""Names of both harnesses, of the paper's sets, and what is said of names that are neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemoe_ds.errors import ConfigError
from gemoe_ds.evaluation.benchmarks.load_tasks import (
    SETS,
    load_tasks,
    resolve,
    without_examples,
)
from gemoe_ds.evaluation.benchmarks.local_data import DataPlaces
from gemoe_ds.evaluation.benchmarks.prompt_styles.molmo import MolmoStyle
from gemoe_ds.evaluation.benchmarks.task_options import TaskOptions


def test_the_paper_s_sets() -> None:
    asked = resolve(["paper-vision", "paper-more", "paper-language"])
    by_harness = {
        harness: [one.leaf.task_name for one in asked if one.leaf.harness == harness]
        for harness in ("lm_eval", "lmms_eval")
    }
    assert by_harness["lmms_eval"] == [*SETS["paper-vision"], *SETS["paper-more"]]
    assert len(by_harness["lm_eval"]) == 57 + 27 + 2
    assert {one.default_shots for one in asked if one.name == "mmlu"} == {5}


def test_loaded_tasks_know_their_group_and_choices(miniature: Path) -> None:
    options = TaskOptions(limit=2, data=DataPlaces(miniature))
    gsm8k, pope = load_tasks(["gsm8k", "pope"], options)
    assert (gsm8k.harness, pope.harness) == ("lm_eval", "lmms_eval")
    assert (gsm8k.name, gsm8k.group, gsm8k.num_documents) == ("gsm8k", None, 2)
    assert gsm8k.choices == {"num_fewshot": 5, "limit": 2, "chat_template": "none"}
    assert pope.choices == {"num_fewshot": 0, "limit": 2}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["gsm8k", "gsm8k", "lmms_eval:gsm8k"], "both have gsm8k, and ask it in two ways"),
        (["paper-language", "mmlu_anatomy"], "both have mmlu_anatomy"),
        ([], "name some"),
        (["mmmu_val", "lm_eval:mmmu_val_art"], "about pictures, which lmms_eval's"),
    ],
)
def test_names_that_cannot_be_asked(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["paper-visoin"], "neither a set .*near it are paper-vision"),
        (["MMLU"], "near it are mmlu$"),
        (["mmlu,gsm8k"], "mmlu,gsm8k: several are separated by blanks"),
        (["lm_eval:pope"], "lm_eval:pope: neither a set"),
        (["lmms-eval:pope"], "lmms-eval:pope: neither a set"),
        (["videomme"], "videomme is about video"),
    ],
)
def test_names_that_both_harnesses_are_read_for(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(names)


def test_options_that_cannot_be(miniature: Path) -> None:
    for options, message in (
        (TaskOptions(limit=0), "--limit 0"),
        (TaskOptions(num_fewshot=-1), "--num-fewshot -1"),
        (TaskOptions(num_fewshot=3), "none of --tasks is a language task"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_tasks(["pope"], options)


def test_tasks_that_fix_no_examples_are_named(miniature: Path) -> None:
    options = TaskOptions(num_fewshot=3, limit=1, data=DataPlaces(miniature))
    both = load_tasks(["gsm8k", "humaneval", "pope"], options)
    assert [task.choices["num_fewshot"] for task in both] == [3, 0, 0]
    assert without_examples(both, options).endswith(
        "changes nothing in humaneval, whose files fix 0"
    )
    assert without_examples(both[:1], options) == ""
    with pytest.raises(ConfigError, match="changes nothing in humaneval, .*; leave it out"):
        without_examples(both[1:], options)


def test_a_prompt_style_is_for_vision_tasks(miniature: Path) -> None:
    options = TaskOptions(style=MolmoStyle(), data=DataPlaces(miniature))
    with pytest.raises(ConfigError, match="--prompt-style molmo: none of --tasks is a vision"):
        load_tasks(["gsm8k"], options)
