"""What a library changes for its whole process is undone before each test."""

from __future__ import annotations

import pytest
from PIL import ImageFile


@pytest.fixture(autouse=True)
def as_pillow_is(monkeypatch):
    """lmms_eval, once imported, lets Pillow show what there is of a damaged picture."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
