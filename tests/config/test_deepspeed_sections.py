"""Optimizer and scheduler of a DeepSpeed file agree with the recipe, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gemoe_ds.config import deepspeed_config
from gemoe_ds.errors import ConfigError
from tests.config.deepspeed_files import ignored, loaded, refusal

AUTO_WARMUP = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")


@pytest.mark.parametrize(
    ("scheduler", "refused_with"),
    [
        ({"type": "WarmupLR", "params": AUTO_WARMUP}, None),
        ({"type": "WarmupDecayLR", "params": AUTO_WARMUP | {"total_num_steps": "auto"}}, None),
        ({"type": "WarmupCosineLR", "params": {"total_num_steps": 10}}, None),
        ({"type": "WarmupLR", "params": AUTO_WARMUP | {"warmup_num_steps": 9}}, ["=9", "steps=0"]),
        ({"type": "WarmupLR", "params": AUTO_WARMUP | {"warmup_max_lr": 1}}, ["=1", "lr=0.001"]),
        ({"type": "WarmupDecayLR", "params": {"total_num_steps": 10}}, ["DecayLR", "=cosine"]),
        ({"type": "OneCycle", "params": {"cycle_min_lr": 0.1}}, ["OneCycle", "=cosine"]),
    ],
)
def test_a_scheduler_is_filled_in_agrees_or_is_refused_with_both_values(
    tmp_path: Path, scheduler: Any, refused_with: list[str] | None
) -> None:
    if refused_with is None:
        (line,) = ignored(tmp_path, {"scheduler": scheduler})
        assert "optim.schedule=cosine, optim.warmup_steps=0" in line
    else:
        message = refusal(tmp_path, {"scheduler": scheduler})
        assert all(words in message for words in refused_with)


def test_an_optimizer_agrees_in_deepspeed_s_own_terms(tmp_path: Path) -> None:
    agreed = {"lr": "1e-3", "betas": [0.9, 0.999], "weight_decay": 0, "torch_adam": True}
    assert ignored(tmp_path, {"optimizer": {"type": "Adam", "params": agreed}}) == []
    other = {"type": "Adam", "params": {"adam_w_mode": False}}
    assert "adam_w_mode=false contradicts" in refusal(tmp_path, {"optimizer": other})


def test_both_betas_must_agree(tmp_path: Path) -> None:
    betas = {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}
    with pytest.raises(ConfigError, match="optimizer.params.betas=.*0.95.*contradicts"):
        deepspeed_config(loaded(tmp_path, betas), 2, 8)
