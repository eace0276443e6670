"""A folder of a small MolmoE."""

from __future__ import annotations

import pytest

from tests.models.molmoe.small import write_molmoe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_molmoe(tmp_path_factory.mktemp("molmoe"))
