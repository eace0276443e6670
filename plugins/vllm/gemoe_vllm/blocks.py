"""vLLM's MoE blocks with our routing: built as its own models build them, with other arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.config.compilation import CompilationMode
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.platforms import current_platform

from gemoe_vllm._gemoe.errors import ConfigError
from gemoe_vllm.described import layer_of
from gemoe_vllm.experts import EXPERTS
from gemoe_vllm.routing import Routing


class GemoeRunner(MoERunner):
    """The stock one, opaque to torch.compile on a CPU too: our routing is no code to trace."""

    def _select_forward(self) -> Callable:
        compiled = get_current_vllm_config().compilation_config.mode != CompilationMode.NONE
        if not (current_platform.is_cpu() and compiled):
            return super()._select_forward()
        ops = torch.ops.vllm
        return ops.moe_forward if self._shared_experts is None else ops.moe_forward_shared


class NoGate(nn.Module):
    """In the place of a block's gate: routing makes its logits itself, from the block's input."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        return hidden_states, None


@contextmanager
def built_with(module: ModuleType, routings: Mapping[int, Routing]) -> Iterator[list[int]]:
    """While a model is built from `module` its MoE blocks get these routings, by layer.

    Gives the list of the layers that did. No hook of vLLM hands a model's blocks their router:
    the function that makes them is replaced in the model's module, for this long.
    """
    stock, built = module.FusedMoEFactory, []

    def factory(*args: Any, prefix: str = "", **given: Any) -> MoERunner:
        layer = layer_of(prefix)
        if layer not in routings:
            return stock(*args, prefix=prefix, **given)
        routing = routings[layer]
        _check(given, routing, prefix)
        made = stock(*args, prefix=prefix, **given | _arguments(routing))
        _check_backend(made, prefix)
        built.append(layer)
        return made

    module.FusedMoEFactory = factory
    try:
        yield built
    finally:
        module.FusedMoEFactory = stock


def _arguments(routing: Routing) -> dict[str, Any]:
    return {
        "top_k": routing.width,
        "custom_routing_function": routing,
        "renormalize": False,
        "use_grouped_topk": False,
        "scoring_func": "softmax",
        "routed_scaling_factor": 1.0,  # it is in our weights already
        "apply_routed_scale_to_output": False,
        "gate": None,
        "runner_cls": GemoeRunner,
        "routed_experts_cls": EXPERTS.get(routing.slots),
        "routed_experts_args": {"routing": routing} if routing.slots in EXPERTS else None,
    }


def _check(given: Mapping[str, Any], routing: Routing, prefix: str) -> None:
    if given["num_experts"] != routing.router.spec.num_experts:
        raise ConfigError(
            f"{prefix}: config.json has {given['num_experts']} experts, and its `gemoe` "
            f"{routing.router.spec.num_experts}; export the run again"
        )
    parallel = get_current_vllm_config().parallel_config
    if parallel.enable_expert_parallel and current_platform.is_cpu():
        raise ConfigError(
            f"{prefix}: vLLM's CPU kernel knows no expert map, so that ranks would read experts "
            "that they have not; leave --enable-expert-parallel out"
        )
    if given.get("quant_config") is not None:
        name = given["quant_config"].get_name()
        raise ConfigError(
            f"{prefix}: a quantised base ({name}) is not served with its trained routing; serve "
            "the folder unquantised, or without the plugin (VLLM_PLUGINS=) at a fixed k"
        )
    if given.get("fuse_shared_experts"):
        raise ConfigError(
            f"{prefix}: shared experts as slots of the routed ones are not supported; set "
            "VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=0"
        )
    if given.get("e_score_correction_bias") is not None:
        raise ConfigError(f"{prefix}: a base with a bias on its scores (noaux_tc) is not supported")


def _check_backend(made: MoERunner, prefix: str) -> None:
    """The CPU's one asks for our routing even where it is monolithic (vLLM 0.29 to 0.31)."""
    method = made.routed_experts.quant_method
    if method.is_monolithic and not current_platform.is_cpu():
        raise ConfigError(
            f"{prefix}: the MoE backend {type(method).__name__} routes within its kernel, where "
            "trained routing has no place; choose another one, such as --moe-backend triton"
        )


def without_gates(model: nn.Module) -> None:
    """Takes the gates out of the blocks that have our routing."""
    for block in list(model.modules()):
        if isinstance(getattr(block, "experts", None), GemoeRunner):
            block.gate = NoGate()


def served_rows(num_tokens: int) -> Tensor | bool:
    """Which rows of a step belong to requests: others fill up a CUDA graph, or warm it up."""
    mappings = get_forward_context().slot_mapping
    if not isinstance(mappings, dict) or not mappings:
        return False  # no key-value cache yet: memory is being measured
    mapping_T = next(iter(mappings.values()))
    if current_platform.is_cpu():
        return bool(mapping_T[0] >= 0)  # all or none
    return mapping_T[:num_tokens] >= 0 if len(mapping_T) >= num_tokens else True
