"""`gemoe.enabled: false` in config.json: the static k, and a line that says it."""

from __future__ import annotations

from types import SimpleNamespace

from tests.plugins.vllm.described import make_described


def test_the_stock_model_is_served_and_a_line_says_so(caplog):
    from gemoe_sglang.model import Gemoe

    class Stock:
        def __init__(self, config, quant_config):
            self.made = True

        def load_weights(self, weights):
            return set(weights)

    found, _, _ = make_described("gemoe", {})
    served = type("Served", (Gemoe, Stock), {})(SimpleNamespace(gemoe=found | {"enabled": False}))
    assert served.made and served.gemoe is None
    assert served.load_weights(["model.layers.0.mlp.gate.weight"])
    assert "gemoe.enabled: false, so k is static" in caplog.text
