"""The plugin as its wheel has it: built, unpacked, and imported from there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers import repository


@pytest.fixture(scope="session")
def sglang_wheel(tmp_path_factory) -> Path:
    """Built from a copy of the repository's folders, as the build writes into them."""
    folder = tmp_path_factory.mktemp("sglang_plugin")
    without = shutil.ignore_patterns("__pycache__", "_gemoe", "_served", "build", "*.egg-info")
    for name in ("gemoe_ds", "plugins/vllm", "plugins/sglang"):
        shutil.copytree(repository() / name, folder / "source" / name, ignore=without)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build],
        cwd=folder / "source/plugins/sglang",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def sglang_installed(sglang_wheel) -> Path:
    folder = sglang_wheel.parent / "installed"
    zipfile.ZipFile(sglang_wheel).extractall(folder)
    return folder


@pytest.fixture(autouse=True)
def importable(sglang_installed, monkeypatch):
    monkeypatch.syspath_prepend(sglang_installed)
