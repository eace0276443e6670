"""A folder of each small MoE-LLaVA."""

from __future__ import annotations

import pytest

from tests.models.moe_llava.small import NAMES, write_moe_llava


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    return request.param, write_moe_llava(request.param, tmp_path_factory.mktemp(request.param))
