"""The plugin as its wheel has it: built, unpacked, and imported from there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers import repository
from tests.wheels import build_wheel, unpacked


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the repository's folders, as the build writes into them."""
    folder = tmp_path_factory.mktemp("plugin")
    without = shutil.ignore_patterns("__pycache__", "_gemoe", "build", "*.egg-info")
    for name in ("gemoe_ds", "plugins/vllm"):
        shutil.copytree(repository() / name, folder / "source" / name, ignore=without)
    return build_wheel(folder / "source/plugins/vllm", folder)


@pytest.fixture(scope="session")
def installed(wheel) -> Path:
    return unpacked(wheel)


@pytest.fixture(autouse=True)
def importable(installed, monkeypatch):
    monkeypatch.syspath_prepend(installed)
