"""A data folder for all tests of the benchmarks, and caches that go away."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from tests.evaluation.benchmarks.miniature import write_miniature


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All benchmarks in miniature, as `--data-root` takes them."""
    patch = pytest.MonkeyPatch()
    cache = tmp_path_factory.mktemp("datasets_cache")
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)  # read when datasets is imported
    patch.setenv("HF_DATASETS_CACHE", str(cache))
    patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("views")))
    yield write_miniature(tmp_path_factory.mktemp("hub"))
    patch.undo()
