"""The plugin as its wheel has it: built, unpacked, and imported from there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers import repository
from tests.wheels import build_wheel, unpacked


@pytest.fixture(scope="session")
def sglang_wheel(tmp_path_factory) -> Path:
    """Built from a copy of the repository's folders, as the build writes into them."""
    folder = tmp_path_factory.mktemp("sglang_plugin")
    without = shutil.ignore_patterns("__pycache__", "_gemoe", "_served", "build", "*.egg-info")
    for name in ("gemoe_ds", "plugins/vllm", "plugins/sglang"):
        shutil.copytree(repository() / name, folder / "source" / name, ignore=without)
    return build_wheel(folder / "source/plugins/sglang", folder)


@pytest.fixture(scope="session")
def sglang_installed(sglang_wheel) -> Path:
    return unpacked(sglang_wheel)


@pytest.fixture(autouse=True)
def importable(sglang_installed, monkeypatch):
    monkeypatch.syspath_prepend(sglang_installed)
