"""Peers that need not be installed: torchtitan's MoE layer, and on a GPU megatron-core's.

megatron-core's layer is written from its source (0.16.1) and was NEVER RUN: its router asks for a
CUDA device, and no GPU was at hand. Shapes: T tokens, D model, E experts, F expert width.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from benchmarks.problem import Problem

# Into a folder of their own: what they declare is far more than the layer imports.
INSTALL = {
    "torchtitan": "pip install --no-deps --target runs/peers torchtitan==0.3.0 spmd_types==0.2.3 "
    "tyro docstring_parser; then PYTHONPATH=runs/peers make bench",
    "megatron": "pip install --no-deps --target runs/peers megatron-core==0.16.1; then "
    "PYTHONPATH=runs/peers make bench",
}
_MODULES = {
    "torchtitan": "torchtitan.models.common.moe",
    "megatron": "megatron.core.transformer.moe.moe_layer",
}


def why_not(name: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this peer takes no part; None if it does, as those do that are always installed."""
    if name not in _MODULES:
        return None
    if name == "megatron" and device.type != "cuda":
        return "its router asks for a CUDA device"
    if dtype != torch.bfloat16:
        return "it multiplies in bfloat16 whatever the dtype"
    try:
        importlib.import_module(_MODULES[name])
    except ImportError as error:
        return f"not installed ({error}): {INSTALL[name]}"
    return None


def torchtitan_layer(problem: Problem, trainable: bool) -> nn.Module:
    """Its MoE layer of one process at the backbone's k; routes in the dtype of the layer on a CPU,
    where it asks autocast for float32 in vain."""
    moe: Any = importlib.import_module(_MODULES["torchtitan"])
    dispatcher: Any = importlib.import_module("torchtitan.models.common.token_dispatcher")
    linear: Any = importlib.import_module("torchtitan.models.common.linear")
    shape, weights = problem.shape, problem.weights
    size = {"num_experts": shape.num_experts}
    config = moe.MoE.Config(
        **size,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(
                dim=shape.d_model, hidden_dim=shape.width, **size
            ),
            token_dispatcher=dispatcher.LocalTokenDispatcher.Config(top_k=shape.top_k, **size),
        ),
        router=moe.TokenChoiceTopKRouter.Config(
            gate=linear.Linear.Config(in_features=shape.d_model, out_features=shape.num_experts),
            top_k=shape.top_k,
            score_func="softmax",
            **size,
        ),
        load_balance_coeff=None,
    )
    with torch.device("meta"):
        layer: nn.Module = config.build()
    layer.to_empty(device=problem.x_TD.device)
    gate_EFD, up_EFD = weights.gate_up_EGD.chunk(2, dim=1)
    experts: Any = layer.routed_experts.inner_experts  # type: ignore[union-attr]
    for name, weight in (("w1_EFD", gate_EFD), ("w3_EFD", up_EFD), ("w2_EDF", weights.down_EDF)):
        setattr(experts, name, nn.Parameter(weight.contiguous(), requires_grad=trainable))
    router: Any = layer.router
    router.gate.weight = nn.Parameter(weights.gate_ED.to(problem.x_TD.dtype))
    return layer


class _SequenceFirst(nn.Module):
    """A layer that wants [S, B, D] and gives a bias beside its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TBD: Tensor = self.layer(x_TD[:, None])[0]
        return y_TBD[:, 0]


def megatron_layer(problem: Problem, trainable: bool) -> nn.Module:
    """megatron-core's layer at the backbone's k, its experts one after the other, or grouped where
    Transformer Engine is installed. NEVER RUN."""
    state: Any = importlib.import_module("megatron.core.parallel_state")
    seeds: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    specs: Any = importlib.import_module("megatron.core.models.gpt.moe_module_specs")
    configs: Any = importlib.import_module("megatron.core.transformer.transformer_config")
    engine: Any = importlib.import_module("megatron.core.extensions.transformer_engine")
    shape, weights = problem.shape, problem.weights
    if not state.model_parallel_is_initialized():
        state.initialize_model_parallel()
        seeds.model_parallel_cuda_manual_seed(0)
    utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(utils, "te_general_gemm"):
        utils.te_general_gemm = None  # 0.16.1 asks for it where there is no Transformer Engine, too
    grouped = bool(engine.HAVE_TE)
    config = configs.TransformerConfig(
        num_layers=1,
        num_attention_heads=max(shape.d_model // 128, 1),
        hidden_size=shape.d_model,
        num_moe_experts=shape.num_experts,
        moe_ffn_hidden_size=shape.width,
        moe_router_topk=shape.top_k,
        moe_router_pre_softmax=True,  # raw scores, not divided by the sum of the chosen ones
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=grouped,
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        perform_initialization=False,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    spec = specs.get_moe_module_spec(
        use_te=grouped, num_experts=shape.num_experts, moe_grouped_gemm=grouped
    )
    layer: Any = spec.module(config, submodules=spec.submodules).to(problem.x_TD.device)
    layer.set_layer_number(1)
    layer.router.weight = nn.Parameter(weights.gate_ED.clone())
    for number in range(shape.num_experts):
        names = ("linear_fc1", weights.gate_up_EGD), ("linear_fc2", weights.down_EDF)
        for name, of_all in names:
            weight = nn.Parameter(of_all[number], requires_grad=trainable)
            if grouped:
                setattr(getattr(layer.experts, name), f"weight{number}", weight)
            else:
                getattr(layer.experts.local_experts[number], name).weight = weight
    return _SequenceFirst(layer)
