"""What a library changes for its whole process is undone before each test."""

from __future__ import annotations

import pytest
from PIL import ImageFile


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """lmms_eval, once imported, lets Pillow show what there is of a damaged picture. Undone before
    the fixtures of a module are made, too."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False
