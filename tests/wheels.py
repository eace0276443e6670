"""Wheels built from a folder, and unpacked."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.helpers import repository


def build_wheel(source: Path, into: Path) -> Path:
    """Of the package in `source`, by setuptools as it is installed here."""
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(into)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = into.glob("*.whl")
    return built


def plugin_wheel(name: str, into: Path, *beside: str) -> Path:
    """Of plugins/`name`, built from a copy of the folders that it takes code from: gemoe_ds and
    those `beside`. The build writes into them."""
    without = shutil.ignore_patterns("__pycache__", "_gemoe", "_served", "build", "*.egg-info")
    for folder in ("gemoe_ds", f"plugins/{name}", *beside):
        shutil.copytree(repository() / folder, into / "source" / folder, ignore=without)
    return build_wheel(into / "source/plugins" / name, into)


def unpacked(wheel: Path) -> Path:
    """A folder that can be imported from, beside it."""
    folder = wheel.parent / "installed"
    zipfile.ZipFile(wheel).extractall(folder)
    return folder
