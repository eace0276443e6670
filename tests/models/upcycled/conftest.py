"""A small dense LLaVA with a tokenizer and data."""

from __future__ import annotations

import pytest

from tests.models.upcycled.small import write_dense
from tests.tiny import write_tokenizer
from tests.train.resuming import write_data


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    root = tmp_path_factory.mktemp("dense")
    return {
        "dense": write_dense(root / "dense"),
        "tokenizer": write_tokenizer(root / "tokenizer"),
        "data": write_data(root / "data"),
        "root": root,
    }
