"""A vLLM model whose MoE blocks route as in training, where its config.json says so."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from gemoe_vllm import described
from gemoe_vllm._gemoe.errors import ConfigError
from gemoe_vllm.blocks import built_with, served_rows, without_gates
from gemoe_vllm.counts import Counts, folder
from gemoe_vllm.options import Options
from gemoe_vllm.routing import Routing, ServedContext

logger = init_logger("vllm.gemoe")  # what vLLM shows

FILE, PREFIX = "routers.safetensors", "gemoe_routers."


class Gemoe:
    """Mixed in before a stock model class. `blocks_in`: the module that has its MoE blocks."""

    blocks_in: ClassVar[ModuleType]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        found = getattr(vllm_config.model_config.hf_config, "gemoe", None)
        if not found:
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
        model = vllm_config.model_config
        self.secondary_weights = [
            DefaultModelLoader.Source(
                model.model,
                revision=model.revision,
                prefix=PREFIX,
                fall_back_to_pt=False,
                allow_patterns_overrides=[FILE],
            )
        ]
        _log(routers, options)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        if self.gemoe is None:
            return super().load_weights(weights)  # type: ignore[misc]
        routers, _ = self.gemoe
        own: dict[str, Tensor] = {}
        loaded = super().load_weights(_others(weights, own, set(routers)))  # type: ignore[misc]
        described.load(routers, own)
        return loaded

    def compute_logits(self, *args: Any, **kwargs: Any) -> Tensor | None:
        if self.gemoe is not None:
            self.gemoe[1].publish()  # here, as this runs once a step and in no CUDA graph
        return super().compute_logits(*args, **kwargs)  # type: ignore[misc]


def _others(
    weights: Iterable[tuple[str, Tensor]], own: dict[str, Tensor], layers: set[int]
) -> Iterator[tuple[str, Tensor]]:
    """What the stock model loads. The routers' own goes to `own`; the stock gates are in it too,
    in float32."""
    for name, tensor in weights:
        if name.startswith(PREFIX):
            own[name.removeprefix(PREFIX)] = tensor.clone()
        elif re.match(r"\d+\.", name):
            pass  # the same, of an export without an index: the loader takes every *.safetensors
        elif not (name.endswith(".mlp.gate.weight") and described.layer_of(name) in layers):
            yield name, tensor


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
