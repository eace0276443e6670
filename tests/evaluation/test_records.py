"""What a record calls a method."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gemoe_ds.evaluation.arguments import RoutingMode
from gemoe_ds.evaluation.records import method_name
from gemoe_ds.moe.router import Router, RoutingSpec


@pytest.mark.parametrize(
    "router, trained, mode, expected",
    [
        ("top_k", "run", RoutingMode(k=4), "top_k"),  # beside what a run trained: untouched
        ("top_k", None, RoutingMode(k=4), "top_k"),
        ("top_k", "run", RoutingMode(), "top_k_tuned"),
        ("score", "run", RoutingMode(router="score"), "score_tuned"),
        ("score", None, RoutingMode(router="score"), "score"),
        ("gemoe", "run", RoutingMode(mean_k=3.0), "gemoe"),
    ],
)
def test_tuned_is_what_a_run_has_tuned(
    router: str, trained: str | None, mode: RoutingMode, expected: str
) -> None:
    chosen = Router.named(router)
    layer = SimpleNamespace(router=chosen(chosen.Config(), RoutingSpec(4, 8, 2, False)))
    arguments = SimpleNamespace(name=None, trained=trained)
    session: Any = SimpleNamespace(arguments=arguments, model=SimpleNamespace(moe_layers=[layer]))
    assert method_name(session, mode) == expected
    arguments.name = "mine"
    assert method_name(session, mode) == "mine"
