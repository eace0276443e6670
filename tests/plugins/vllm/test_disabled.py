"""`gemoe.enabled: false` in config.json: the static k, as in transformers, and a line that says it.

vLLM is pretended: what the plugin does before it asks vLLM for anything.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from tests.plugins.vllm.described import make_described

PRETENDED = ("vllm", "vllm.config", "vllm.distributed", "vllm.logger")


@pytest.fixture
def model_class(monkeypatch):
    for name in (*PRETENDED, "gemoe_vllm.blocks"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.delitem(sys.modules, "gemoe_vllm.model", raising=False)
    from gemoe_vllm.model import Gemoe

    class Stock:
        def __init__(self, *, vllm_config, prefix):
            self.made = True

        def load_weights(self, weights):
            return set(weights)

    yield type("Served", (Gemoe, Stock), {})
    sys.modules.pop("gemoe_vllm.model")


def test_trained_routing_is_what_config_json_says():
    from gemoe_vllm._gemoe.errors import ConfigError
    from gemoe_vllm.described import trained_routing

    found, _, _ = make_described("gemoe", {})
    assert trained_routing(SimpleNamespace(gemoe=found)) is found
    assert trained_routing(SimpleNamespace(gemoe=found | {"enabled": True}))
    assert trained_routing(SimpleNamespace(gemoe=found | {"enabled": False})) is None
    assert trained_routing(SimpleNamespace()) is None
    with pytest.raises(ConfigError, match="gemoe.enabled='false'; it is true or false"):
        trained_routing(SimpleNamespace(gemoe=found | {"enabled": "false"}))


def test_the_stock_model_is_served_and_a_line_says_so(model_class):
    found, _, _ = make_described("gemoe", {})
    config = SimpleNamespace(gemoe=found | {"enabled": False})
    served = model_class(
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
    )
    assert served.made and served.gemoe is None
    assert served.load_weights(["model.layers.0.mlp.gate.weight"])
    logger = sys.modules[model_class.__mro__[1].__module__].logger
    (said,) = [call.args[0] for call in logger.info.call_args_list]
    assert "gemoe.enabled: false, so k is static" in said
