"""A small run with a DeepSpeed file: what it comes to, what it ignores, what refuses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemoe_ds.config import (
    RunConfig,
    deepspeed_config,
    load_config,
)
from gemoe_ds.config.deepspeed import check_deepspeed
from gemoe_ds.errors import ConfigError
from tests.config.minimal import MINIMAL

ZERO = "zero_optimization"


def loaded(folder: Path, content: Any, *overrides: str) -> RunConfig:
    """A run with this DeepSpeed file: bytes, text, or what becomes JSON."""
    file, recipe = folder / "ds.json", folder / "recipe.yaml"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    recipe.write_text(MINIMAL)
    return load_config(recipe, [f"deepspeed={file}", *overrides])


def resolved(folder: Path, content: Any, *overrides: str) -> dict[str, Any]:
    return deepspeed_config(loaded(folder, content, *overrides), 2, hidden_size=20)


def refusal(folder: Path, content: Any, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_deepspeed(loaded(folder, content, *overrides), 2)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ignored(folder: Path, content: Any, *overrides: str) -> list[str]:
    config = loaded(folder, content, *overrides)
    return [line.partition("ds.json: ")[2] for line in check_deepspeed(config, 2)]
