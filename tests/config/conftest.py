"""The smallest recipe as a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.minimal import MINIMAL


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path
