"""The plugin as its wheel has it: built, unpacked, and imported from there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.wheels import plugin_wheel, unpacked


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    return plugin_wheel("vllm", tmp_path_factory.mktemp("plugin"))


@pytest.fixture(scope="session")
def installed(wheel) -> Path:
    return unpacked(wheel)


@pytest.fixture(autouse=True)
def importable(installed, monkeypatch):
    monkeypatch.syspath_prepend(installed)
