"""The tiny base that tests share; what a library changes for its whole process is undone."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import ImageFile


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """lmms_eval, once imported, lets Pillow show what there is of a damaged picture. Undone before
    the fixtures of a module are made, too."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random tiny model and its tokenizer, which no test writes to."""
    from tests.tiny import write_base

    return write_base(tmp_path_factory.mktemp("base"))
