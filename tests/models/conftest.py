"""Every backbone small, written once."""

from __future__ import annotations

from functools import cache

import pytest

from tests.models.cases import write_case
from tests.models.upcycled.small import write_dense
from tests.tiny import write_tokenizer


@pytest.fixture(scope="session")
def folders(base, tmp_path_factory):
    """A model's folder and a tokenizer's, of the backbone of that name; no test writes to them."""

    @cache
    def written(name):
        if name == "tiny":
            return base
        root = tmp_path_factory.mktemp(name)
        if name == "upcycled":
            return write_dense(root / "dense"), write_tokenizer(root / "tokenizer")
        return write_case(name, root)

    return written
