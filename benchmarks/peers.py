"""The layers that ours is measured against, each from its own installed package, on our weights.

Each is a module x_TD -> y_TD. What a peer cannot do is said where it is built. Shapes: T tokens,
K = top_k, E experts, D model, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from benchmarks import optional_peers
from benchmarks.problem import Ours, Problem
from gemoe_ds.engine.world import World

RENORMALISES = {"classic_moe"}  # divides the chosen scores by their sum: other mathematics


def build(name: str, problem: Problem, router: Ours, trainable: bool, world: World) -> nn.Module:
    """The peer of that name; `router` decides for those that can be told what to do."""
    return PEERS[name](problem, router, trainable, world)


def _hf_block(problem: Problem, trainable: bool, implementation: str) -> OlmoeSparseMoeBlock:
    """transformers' OLMoE block; routes in the dtype of the layer, not in float32."""
    shape, weights = problem.shape, problem.weights
    config = OlmoeConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.width,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=False,
        experts_implementation=implementation,  # type: ignore[call-arg]
    )
    with torch.device("meta"):
        block = OlmoeSparseMoeBlock(config)
    block.gate.weight = nn.Parameter(weights.gate_ED.to(problem.x_TD.dtype))
    block.experts.gate_up_proj = nn.Parameter(weights.gate_up_EGD, requires_grad=trainable)
    block.experts.down_proj = nn.Parameter(weights.down_EDF, requires_grad=trainable)
    return block


class _Batched(nn.Module):
    """A layer that wants [B, S, D]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: Tensor) -> Tensor:
        y: Any = self.layer(x_TD[None])
        return (y[0] if isinstance(y, tuple) else y)[0]


def _hf(implementation: str) -> Callable[..., nn.Module]:
    def build_hf(problem: Problem, router: Ours, trainable: bool, world: World) -> nn.Module:
        return _Batched(_hf_block(problem, trainable, implementation))

    return build_hf


def _auto_ep(*, grouped: bool) -> Callable[..., nn.Module]:
    """AutoEP's layer at the backbone's k, with its expert loop or with torch's grouped product."""

    def build_auto_ep(problem: Problem, router: Ours, trainable: bool, world: World) -> nn.Module:
        return _Batched(_auto_ep_layer(problem, trainable, world, grouped))

    return build_auto_ep


def _auto_ep_layer(
    problem: Problem, trainable: bool, world: World, grouped: bool
) -> AutoEPMoELayer:
    shape = problem.shape
    spec = MoELayerSpec(
        moe_module_name="mlp",
        model_family="olmoe",
        router_name="gate",
        experts_name="experts",
        expert_storage="fused_3d",
        expert_w1_name="gate_up_proj",
        expert_w2_name="down_proj",
        expert_w3_name=None,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        hidden_size=shape.d_model,
        ffn_hidden_size=shape.width,
        score_func="softmax",
        score_apply="post",
        route_norm=False,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
    )
    config = AutoEPConfig(
        enabled=True, autoep_size=world.size, use_grouped_mm=grouped, load_balance_coeff=None
    )
    block = _hf_block(problem, trainable, "eager")
    layer = AutoEPMoELayer(spec, block, world.size, world.rank, config)
    layer = layer.to(problem.x_TD.device, problem.x_TD.dtype)
    layer.set_deepspeed_parallelism()
    return layer


def _auto_ep_padded(problem: Problem, router: Ours, trainable: bool, world: World) -> nn.Module:
    """AutoEP with a different k for every token, the only way it can: K rows each, some weigh 0."""
    layer = _auto_ep_layer(problem, trainable, world, grouped=False)
    layer.router = _PaddedRouter(router, problem.shape.top_k)
    return _Batched(layer)


class _PaddedRouter(nn.Module):
    """Answers as AutoEP's router does, from the decisions of ours."""

    def __init__(self, ours: Ours, top_k: int) -> None:
        super().__init__()
        self.ours, self.top_k = ours, top_k

    def forward(self, x_TD: Tensor, expert_bias: None) -> tuple[Tensor, Tensor, Tensor]:
        valid_BS = torch.ones(1, len(x_TD), dtype=torch.bool, device=x_TD.device)
        self.ours.ctx.begin(valid_BS, ~valid_BS)
        decision, _ = self.ours.layer.router.decide(x_TD, self.ours.ctx)
        ids_TK = decision.scores_TE.topk(self.top_k, dim=-1).indices
        weights_TK = (decision.weights_TE * decision.mask_TE).gather(1, ids_TK)
        counts_E = torch.bincount(ids_TK.view(-1), minlength=decision.mask_TE.shape[1])
        return weights_TK, ids_TK, counts_E.to(torch.int32)


class _SwiGLU(nn.Module):
    """One expert for DeepSpeed's MoE layer, which copies it and then gets our weights."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.down(nn.functional.silu(gate) * up)
        return out


def _classic_moe(problem: Problem, router: Ours, trainable: bool, world: World) -> nn.Module:
    """DeepSpeed's older layer, no token dropped: pads every expert to the busiest one.

    It divides the chosen scores by their sum, always.
    """
    shape, weights = problem.shape, problem.weights
    with torch.device("meta"):
        expert = _SwiGLU(shape.d_model, shape.width)
    moe = MoE(
        shape.d_model,
        expert,
        num_experts=shape.num_experts,
        ep_size=world.size,
        k=shape.top_k,
        drop_tokens=False,
        use_rts=False,
    )
    moe.set_deepspeed_parallelism()
    local = moe.num_local_experts
    for index, own in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
        number = world.rank * local + index
        own.gate_up.weight = nn.Parameter(weights.gate_up_EGD[number], requires_grad=trainable)
        own.down.weight = nn.Parameter(weights.down_EDF[number], requires_grad=trainable)
    moe.deepspeed_moe.gate.wg.weight.data = weights.gate_ED.clone()
    return _Batched(moe)


def _torchtitan(problem: Problem, router: Ours, trainable: bool, world: World) -> nn.Module:
    return _Batched(optional_peers.torchtitan_layer(problem, trainable))


def _megatron(problem: Problem, router: Ours, trainable: bool, world: World) -> nn.Module:
    return optional_peers.megatron_layer(problem, trainable)


PEERS: dict[str, Callable[..., nn.Module]] = {
    "autoep": _auto_ep(grouped=False),
    "autoep_grouped": _auto_ep(grouped=True),
    "autoep_padded": _auto_ep_padded,
    "hf_eager": _hf("eager"),
    "hf_grouped": _hf("grouped_mm"),
    "classic_moe": _classic_moe,
    "torchtitan": _torchtitan,
    "megatron": _megatron,
}
