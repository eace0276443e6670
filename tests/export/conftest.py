"""One exported folder of transformers' own OLMoE for all tests that only read it."""

from __future__ import annotations

import pytest

from tests.export.families import write_exported


@pytest.fixture(scope="session")
def olmoe_folder(tmp_path_factory):
    return write_exported("olmoe", tmp_path_factory.mktemp("olmoe")).folder
