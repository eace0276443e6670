"""The code for CUDA, run with real values on a machine without one: gpu.py says how.

of_layer.py and of_models.py hold the tests, each in a process of its own: torch must find the hooks
of a GPU as it is loaded, and Triton read as it is imported that it interprets.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pretended_gpu import hooks

pytestmark = pytest.mark.skipif(hooks.why_not() is not None, reason=str(hooks.why_not()))


@pytest.mark.parametrize("file", ["of_layer.py"])
def test_on_a_pretended_gpu(file):
    hooks.run(str(Path(__file__).with_name(file)))
