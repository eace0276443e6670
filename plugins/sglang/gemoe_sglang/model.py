"""An SGLang model whose MoE blocks route as in training, where its config.json says so.

NOT RUN: see gemoe_sglang.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.hub import cached_file

from gemoe_sglang import versions
from gemoe_sglang._gemoe.errors import ConfigError
from gemoe_sglang._served import described
from gemoe_sglang._served.options import Options
from gemoe_sglang._served.routing import Routing, ServedContext
from gemoe_sglang.blocks import SLOTS, install

logger = logging.getLogger("sglang.gemoe")

MOST_TOKENS = 1 << 16  # of a forward; more make the context's buffers anew


class Gemoe:
    """Mixed in before a stock model class."""

    def __init__(self, config: Any, quant_config: Any = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, quant_config, *args, **kwargs)
        self.gemoe: dict[int, Any] | None = None
        found = described.trained_routing(config)
        if found is None:
            if getattr(config, "gemoe", None):
                logger.warning("gemoe: config.json has gemoe.enabled: false, so k is static")
            return
        versions.check()
        if quant_config is not None:
            raise ConfigError(
                "the base model is quantised: its experts are not those that the routers were "
                "trained with; export a run on the base before it was quantised"
            )
        options = Options.of({"gemoe": getattr(config, "gemoe_options", {})})
        if options.slots not in SLOTS:
            raise ConfigError(f"gemoe_options.slots={options.slots}: SGLang has {', '.join(SLOTS)}")
        routers = described.make_routers(found, options)
        device = next(self.parameters()).device  # type: ignore[attr-defined]
        ctx = ServedContext(len(routers), MOST_TOKENS, device)
        install(
            self,  # type: ignore[arg-type]
            {layer: Routing(r.to(device), ctx, options.slots) for layer, r in routers.items()},
        )
        self.gemoe = routers
        self.gemoe_folder = config._name_or_path
        self.gemoe_commit = getattr(config, "_commit_hash", None)  # None: no name on the Hub
        first = next(iter(routers.values()))
        logger.warning(  # SGLang shows nothing below by default
            "gemoe: router %s in %d layers, k up to %d, slots: %s",
            *(first.name, len(routers), first.max_k, options.slots),
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *args: Any) -> Any:
        if self.gemoe is None:
            return super().load_weights(weights, *args)  # type: ignore[misc]
        # SGLang reads what the index lists, and this file is not in it.
        file = cached_file(self.gemoe_folder, described.FILE, revision=self.gemoe_commit)
        assert file is not None  # or it has raised
        described.load(self.gemoe, load_file(file))
        return super().load_weights(  # type: ignore[misc]
            described.others(weights, set(self.gemoe)), *args
        )
