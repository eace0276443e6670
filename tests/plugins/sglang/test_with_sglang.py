"""SGLang's own registry finds the plugin's classes, and its routing asks ours."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


@pytest.mark.serve
@pytest.mark.timeout(1000)
def test_sglang_finds_the_models_and_routes_as_in_training(sglang_installed):
    """GEMOE_SGLANG_PYTHON: an interpreter that imports SGLang 0.5.23."""
    python = os.environ.get("GEMOE_SGLANG_PYTHON")
    if not python:
        pytest.skip("GEMOE_SGLANG_PYTHON names no interpreter with SGLang")
    environment = {
        "PYTHONPATH": str(sglang_installed),
        "SGLANG_EXTERNAL_MODEL_PACKAGE": "gemoe_sglang.models",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [python, Path(__file__).with_name("with_sglang.py")],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=sglang_installed,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "k [1, 2, 3, 4]"
