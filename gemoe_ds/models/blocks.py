"""The MoE blocks of a model: where they hang, what is in them, and our layer in their place.

An adapter reads one class of blocks; a backbone names the classes that its models have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.dispatch import Dispatcher, LocalDispatcher
from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.layer import MoELayer
from gemoe_ds.moe.linear import FrozenLinear
from gemoe_ds.moe.router import Router, RoutingSpec
from gemoe_ds.routers.top_k import TopKRouter

OUR_NAMES = ("router.gate.weight", "experts.gate_up_EGD", "experts.down_EDF")  # in a MoELayer


@dataclass(frozen=True)
class BlockSpec:
    """One MoE block of a loaded model: where it hangs and what is in it.

    Weights are views of the model's own tensors: gate_ED, gate_up_EGD (gate rows above up rows,
    G = 2 F), down_EDF.
    """

    path: str
    parent: nn.Module
    attribute: str
    routing: RoutingSpec
    gate_ED: Tensor
    gate_up_EGD: Tensor
    down_EDF: Tensor
    shared: nn.Module | None = None  # x -> what is added for every token

    @property
    def module(self) -> nn.Module:
        """The block, or what stands in its place."""
        module: nn.Module = getattr(self.parent, self.attribute)
        return module

    @property
    def names(self) -> tuple[str, str, str]:
        """What the block itself calls gate_ED, gate_up_EGD, down_EDF; asked before its change."""
        names = self._names
        return names[id(self.gate_ED)], names[id(self.gate_up_EGD)], names[id(self.down_EDF)]

    @property
    def shared_name(self) -> str | None:
        """What the block itself calls its shared experts; None if none of its modules is that."""
        modules = self.module.named_modules()
        return next((name for name, m in modules if m is self.shared), None)

    @property
    def stock_names(self) -> dict[str, str]:
        """What our layer calls its tensors -> what the block does; asked before its change."""
        names = dict(zip(OUR_NAMES, self.names, strict=True))
        if self.shared is not None:
            theirs = self._names
            names |= {f"shared.{n}": theirs[id(p)] for n, p in self.shared.named_parameters()}
        return names

    @property
    def _names(self) -> dict[int, str]:
        """The block's own name of every parameter in it, by the parameter's id."""
        return {id(parameter): name for name, parameter in self.module.named_parameters()}

    @property
    def params_per_expert(self) -> int:
        return (self.gate_up_EGD.numel() + self.down_EDF.numel()) // self.routing.num_experts


Adapter = Callable[[Any], dict[str, Any]]  # block -> the fields of its BlockSpec after `attribute`
Adapters = Mapping[type[nn.Module], Adapter]  # by the class of the blocks


def find_moe_blocks(model: nn.Module, adapters: Adapters) -> list[BlockSpec]:
    """Every block of these classes, or of classes below them, in order of depth."""
    blocks = []
    for path, module in model.named_modules():
        adapter = next((adapters[c] for c in type(module).__mro__ if c in adapters), None)
        if adapter is not None:
            parent, _, attribute = path.rpartition(".")
            try:
                fields = adapter(module)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
            blocks.append(BlockSpec(path, model.get_submodule(parent), attribute, **fields))
    return blocks


def stock_block(
    block: Any, *, norm_topk_prob: bool | None = None, shared: nn.Module | None = None
) -> dict[str, Any]:
    """transformers' usual block: `gate.weight`, and `experts` stacked. None: as the gate says."""
    gate, experts = block.gate, block.experts
    act = type(getattr(experts, "act_fn", nn.SiLU())).__name__
    if act not in ("SiLU", "SiLUActivation"):
        raise ConfigError(f"experts with {act}; those of gemoe_ds are SwiGLU (hidden_act='silu')")
    if norm_topk_prob is None:
        norm_topk_prob = bool(gate.norm_topk_prob)
    return {
        "routing": RoutingSpec(gate.hidden_dim, gate.num_experts, gate.top_k, norm_topk_prob),
        "gate_ED": gate.weight,
        "gate_up_EGD": experts.gate_up_proj,
        "down_EDF": experts.down_proj,
        "shared": shared,
    }


def deepseek_block(block: Any) -> dict[str, Any]:
    """DeepSeek-V2's: shared experts, scores times a factor and never renormalised."""
    gate = block.gate
    groups = (gate.num_group or 1, gate.topk_group or 1)
    if gate.topk_method != "greedy" and groups != (1, 1):
        raise ConfigError(
            f"topk_method={gate.topk_method!r} of {groups[0]} groups; the routers of gemoe_ds "
            "choose among all experts, as topk_method='greedy' does"
        )
    fields = stock_block(block, norm_topk_prob=False, shared=block.shared_experts)
    factor = float(gate.routed_scaling_factor)
    return fields | {"routing": replace(fields["routing"], routed_scaling_factor=factor)}


class BlockWeights:
    """Where the weights of our layers come from: these are the blocks' own, not copied."""

    def gate(self, block: BlockSpec) -> Tensor:
        return block.gate_ED

    def experts(self, block: BlockSpec) -> tuple[Tensor, Tensor]:
        """gate_up_EGD and down_EDF of the experts that this process holds."""
        return block.gate_up_EGD.data, block.down_EDF.data

    def make_experts(self, block: BlockSpec, *, trainable: bool, pack: bool) -> Experts:
        return Experts(*self.experts(block), trainable=trainable, pack=pack)


def convert_blocks(
    blocks: Sequence[BlockSpec],
    router: tuple[type[Router], Any],
    ctx: TokenContext,
    weights: BlockWeights,
    *,
    trainable: bool,
    pack: bool = False,
    make_dispatcher: Callable[[], Dispatcher] = LocalDispatcher,
    keep_base: bool = False,
) -> list[MoELayer]:
    """Put our layer in the place of every block; none is touched if a router refuses one.

    `router` is its class and options; it starts from the block's gate. `trainable`: the experts.
    `keep_base`: each layer has the block's own routing beside its router, as `base`.
    """
    router_class, config = router
    routers, bases = [], []
    for slot, block in enumerate(blocks):
        gate_ED = weights.gate(block)
        new = router_class(config, replace(block.routing, slot=slot, num_layers=len(blocks)))
        new.adopt_gate(gate_ED)
        routers.append(new.to(gate_ED.device))
        bases.append(base_router(new.spec, gate_ED) if keep_base else None)
    layers = []
    for block, new, base in zip(blocks, routers, bases, strict=True):
        experts = weights.make_experts(block, trainable=trainable, pack=pack)
        layer = MoELayer(new, experts, make_dispatcher(), ctx, block.shared)
        layer.base = base
        layer.train(block.module.training)
        setattr(block.parent, block.attribute, layer)
        layers.append(layer)
    return layers


def base_router(spec: RoutingSpec, gate_ED: Tensor) -> Router:
    """A block's own static routing, by a copy of its gate that nothing trains."""
    with torch.device("meta"):  # no random number is drawn, on which other weights depend
        router = TopKRouter(TopKRouter.Config(), spec)
        router.gate = FrozenLinear(gate_ED)
    return router
