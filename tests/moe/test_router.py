"""What every router says of its parameters."""

from __future__ import annotations

import pytest

from gemoe_ds.moe.router import Router
from tests.routers.cases import make_router


@pytest.mark.parametrize("name", Router.names())
def test_groups_hold_every_parameter_once_and_the_gate_apart(name):
    router = make_router(name, {})
    groups = router.param_groups()
    held = [id(p) for params in groups.values() for p in params]
    assert sorted(held) == sorted(id(p) for p in router.parameters())
    assert [id(p) for p in groups["router"]] == [id(router.gate.weight)]
