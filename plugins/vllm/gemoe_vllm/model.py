"""A vLLM model whose MoE blocks route as in training, where its config.json says so."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.hub import cached_file
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger

from gemoe_vllm import described
from gemoe_vllm._gemoe.errors import ConfigError
from gemoe_vllm.blocks import built_with, served_rows, without_gates
from gemoe_vllm.counts import Counts, folder
from gemoe_vllm.options import Options
from gemoe_vllm.routing import Routing, ServedContext

logger = init_logger("vllm.gemoe")  # what vLLM shows


class Gemoe:
    """Mixed in before a stock model class. `blocks_in`: the module that has its MoE blocks."""

    blocks_in: ClassVar[ModuleType]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        found = described.trained_routing(config)
        if found is None:
            if getattr(config, "gemoe", None):
                logger.info("gemoe: config.json has gemoe.enabled: false, so k is static")
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.gemoe = None
            return
        options = Options.of(vllm_config.additional_config)
        routers = described.make_routers(found, options)
        device = torch.device(vllm_config.device_config.device)
        limit = vllm_config.scheduler_config.max_num_batched_tokens
        ctx = ServedContext(len(routers), limit, device)
        counts = Counts(folder(), len(routers), device)
        counting = get_tensor_model_parallel_rank() == 0  # the others route the same tokens
        routings = {
            layer: Routing(
                router.to(device),
                ctx,
                options.slots,
                counts.row(router.spec.slot) if counting else None,
                served_rows,
            )
            for layer, router in routers.items()
        }
        with built_with(self.blocks_in, routings) as built:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        if get_pp_group().world_size == 1 and sorted(built) != sorted(routings):
            raise ConfigError(
                f"config.json has `gemoe` for layers {sorted(routings)}, and MoE blocks in layers "
                f"{sorted(built)}; export the run again"
            )
        without_gates(self)  # type: ignore[arg-type]
        self.gemoe = routers, counts
        self.gemoe_file = _routers_file(vllm_config)
        _log(routers, options)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        if self.gemoe is None:
            return super().load_weights(weights)  # type: ignore[misc]
        routers, _ = self.gemoe
        described.load(routers, load_file(self.gemoe_file))
        return super().load_weights(described.others(weights, set(routers)))  # type: ignore[misc]

    def compute_logits(self, *args: Any, **kwargs: Any) -> Tensor | None:
        if self.gemoe is not None:
            self.gemoe[1].publish()  # here, as this runs once a step and in no CUDA graph
        return super().compute_logits(*args, **kwargs)  # type: ignore[misc]


def _routers_file(vllm_config: VllmConfig) -> str:
    """In the folder, or fetched as its other files are."""
    model = vllm_config.model_config
    options = {"revision": model.revision, "cache_dir": vllm_config.load_config.download_dir}
    found = cached_file(model.model, described.FILE, token=model.hf_token, **options)
    assert found is not None  # or it has raised
    return found


def _log(routers: dict[int, Any], options: Options) -> None:
    first = next(iter(routers.values()))
    changed = "".join(f", {name}={value}" for name, value in options.router.items())
    logger.info(
        "gemoe: router %s in %d layers, k up to %d, slots: %s%s",
        *(first.name, len(routers), first.max_k, options.slots, changed),
    )
    if first.max_k > 2 * first.spec.top_k and options.slots in ("fold", "zero"):
        logger.warning(
            "gemoe: a token may use %d experts, so that all have as many slots, where the base "
            "model has %d: slow; on a CPU take slots: ragged",
            *(first.max_k, first.spec.top_k),
        )
