"""The plugin as its wheel has it: built, unpacked, and imported from there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.wheels import plugin_wheel, unpacked


@pytest.fixture(scope="session")
def sglang_wheel(tmp_path_factory) -> Path:
    return plugin_wheel("sglang", tmp_path_factory.mktemp("sglang_plugin"), "plugins/vllm")


@pytest.fixture(scope="session")
def sglang_installed(sglang_wheel) -> Path:
    return unpacked(sglang_wheel)


@pytest.fixture(autouse=True)
def importable(sglang_installed, monkeypatch):
    monkeypatch.syspath_prepend(sglang_installed)
