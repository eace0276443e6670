"""A folder of a small DeepSeek-VL2."""

from __future__ import annotations

import pytest

from tests.models.deepseek_vl2.small import write_deepseek_vl2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_deepseek_vl2(tmp_path_factory.mktemp("deepseek_vl2"))
