"""The code for CUDA, run with real values on a machine without one: gpu.py says how.

of_gpu.py, of_layer.py and of_models.py hold the tests, for a process of their own: torch must find
the hooks of a GPU as it is loaded, and Triton reads as it is imported that it interprets.
"""

from __future__ import annotations

import pytest

from tests.pretended_gpu import hooks

pytestmark = pytest.mark.skipif(hooks.why_not() is not None, reason=str(hooks.why_not()))


def test_on_a_pretended_gpu():
    """All in one: most of what a process takes is its imports."""
    hooks.run("of_gpu.py", "of_layer.py", "of_models.py")
