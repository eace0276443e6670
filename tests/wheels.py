"""Wheels built from a folder, and unpacked."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path


def build_wheel(source: Path, into: Path) -> Path:
    """Of the package in `source`, by setuptools as it is installed here."""
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(into)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = into.glob("*.whl")
    return built


def unpacked(wheel: Path) -> Path:
    """A folder that can be imported from, beside it."""
    folder = wheel.parent / "installed"
    zipfile.ZipFile(wheel).extractall(folder)
    return folder
