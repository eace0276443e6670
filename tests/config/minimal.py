"""The smallest recipe: what it loads to, or the one line that refuses it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemoe_ds.config import RunConfig, load_config
from gemoe_ds.errors import ConfigError

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


def load(path: Path, *overrides: str) -> RunConfig:
    return load_config(path, overrides)


def refusal(path: Path, *overrides: str) -> str:
    """The message of the ConfigError; it must be one line."""
    with pytest.raises(ConfigError) as caught:
        load(path, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message
