"""Options under their names before 0.2, in recipes, overrides and checkpoints."""

from __future__ import annotations

import re

import pytest

from gemoe_ds.config.load import config_from_dict, load_config
from gemoe_ds.config.old_names import NEW, with_new_names
from gemoe_ds.errors import ConfigError
from tests.helpers import repository

OLD = """
output_dir: out
model:
  backbone: {name: tiny, num_experts: 8, top_k: 2}
  router: {name: top_k, renormalise: sum}
  train: all
  recompute: true
data: {train: a, validation: b, tokenizer: c, threads: 3, max_broken: 5}
optim: {lr: 1e-3, clip_norm: 0.5}
train: {steps: 2, micro_batch: 3, accumulation: 4}
monitor: {ledger: true}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "old.yaml"
    path.write_text(OLD)
    return path


def test_an_old_recipe_is_read_as_it_was_meant(recipe):
    config = load_config(recipe)
    assert (config.model.trainable, config.model.activation_checkpointing) == ("all", True)
    assert config.model.router.flat(only_set=True) == {"name": "top_k", "norm_topk_prob": "sum"}
    assert (config.data.num_workers, config.data.max_bad_samples) == (3, 5)
    assert config.optim.max_grad_norm == 0.5 and config.monitor.sample_log
    assert (config.train.micro_batch_size, config.train.gradient_accumulation_steps) == (3, 4)
    paths = (config.data.train_path, config.data.validation_path)
    assert [path.rpartition("/")[2] for path in paths] == ["a", "b"]


def test_each_old_name_is_told_once(recipe, capsys):
    from gemoe_ds.config.old_names import _say_once

    _say_once.cache_clear()
    load_config(recipe)
    load_config(recipe)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(set(said)) == 11
    assert (
        "warning: train.micro_batch is called train.micro_batch_size now; the old name"
        in "\n".join(said)
    )


def test_the_last_word_counts_whatever_the_name(recipe):
    """An override in the new name beats a recipe's old one, and the other way round."""
    config = load_config(recipe, ["train.micro_batch_size=7", "optim.clip_norm=2"])
    assert (config.train.micro_batch_size, config.optim.max_grad_norm) == (7, 2)
    extending = recipe.with_name("top.yaml")
    extending.write_text("extends: old.yaml\ntrain: {micro_batch_size: 9}\n")
    assert load_config(extending).train.micro_batch_size == 9


def test_both_names_at_once_are_refused(recipe):
    recipe.write_text(OLD.replace("micro_batch: 3", "micro_batch: 3, micro_batch_size: 3"))
    words = "train.micro_batch is the old name of train.micro_batch_size: give one of them"
    with pytest.raises(ConfigError, match=words):
        load_config(recipe)


def test_every_new_name_is_an_option(recipe):
    """A name that is renamed again, or goes, takes its old ones with it."""
    tree = load_config(recipe).model_dump()
    tree["train"]["global_batch_size"] = None
    for old, new in NEW.items():
        at = tree
        for part in old.split(".")[:-1]:
            at = at[part]
        assert new in at or old == "model.backbone.renormalise", old
    with pytest.raises(ConfigError, match="model.routerr: no such option"):
        config_from_dict(tree | {"model": tree["model"] | {"routerr": 1}})


def test_a_checkpoint_s_identity_is_flat():
    stored = {"model.train": "all", "model.router": {"name": "x", "renormalise": "sum"}, "seed": 3}
    assert with_new_names(stored, warn=False) == {
        "model.trainable": "all",
        "model.router": {"name": "x", "norm_topk_prob": "sum"},
        "seed": 3,
    }


def test_the_page_on_migration_has_every_old_name_beside_its_new_one():
    page = (repository() / "docs/migration.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `")]
    pairs = {pair for old, new in rows for pair in zip(names(old), names(new), strict=False)}
    for old, new in NEW.items():
        assert (old, f"{old.rpartition('.')[0]}.{new}") in pairs


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)
