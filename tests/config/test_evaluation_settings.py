"""Settings of validation, early stop, the best checkpoint and hooks are checked with the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemoe_ds.errors import ConfigError
from tests.train.resuming import make_config

NOWHERE = dict.fromkeys(("root", "hf", "tokenizer", "data"), Path("unused"))
HELD_OUT = {"data__validation_path": "held out"}


def config_of(**changes):
    return make_config(NOWHERE, Path("unused"), **changes)


def test_what_fits_together_is_taken():
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
def test_what_does_not_is_one_line(changes, words):
    with pytest.raises(ConfigError, match=words) as refusal:
        config_of(**changes)
    assert "\n" not in str(refusal.value)
