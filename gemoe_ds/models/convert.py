"""convert(): the MoE blocks of a transformers model that is in memory become ours, weights kept.

Shapes: B sequences, S tokens, T = B S, L MoE layers, E experts, D model, F expert width, G = 2 F.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from gemoe_ds.errors import ConfigError
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.blocks import (
    Adapter,
    BlockSpec,
    BlockWeights,
    convert_blocks,
    deepseek_block,
    find_moe_blocks,
    stock_block,
)
from gemoe_ds.models.handle import MoEHandle
from gemoe_ds.models.stock_state import speak_stock
from gemoe_ds.moe.after_step import before_steps
from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.layer import MoELayer
from gemoe_ds.moe.router import Router


class GatedExpert(nn.Module):
    """Qwen2-MoE's shared expert: sigmoid(w x) times its output, [T, D] -> [T, D]."""

    def __init__(self, expert: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.expert, self.gate = expert, gate

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.gate(x_TD).sigmoid() * self.expert(x_TD)
        return y_TD


def _mixtral_block(block: Any) -> dict[str, Any]:
    if block.jitter_noise:
        raise ConfigError(
            f"router_jitter_noise={block.jitter_noise}: the routers of gemoe_ds add no noise; set "
            "it to 0 in the model's configuration before the model is made"
        )
    return stock_block(block, norm_topk_prob=True)


def _qwen2_block(block: Any) -> dict[str, Any]:
    shared = GatedExpert(block.shared_expert, block.shared_expert_gate)
    return stock_block(block, shared=shared)


# Beside those of the backbones, which can be loaded from a folder and trained by a recipe too.
_ADAPTERS: Mapping[type[nn.Module], Adapter] = {
    DeepseekV2Moe: deepseek_block,
    MixtralSparseMoeBlock: _mixtral_block,
    Qwen2MoeSparseMoeBlock: _qwen2_block,
    Qwen3MoeSparseMoeBlock: stock_block,
}


def convert(
    model: nn.Module,
    router: str | type[Router] = "gemoe",
    *,
    trainable: Literal["routers", "experts", "all"] = "routers",
    **options: Any,
) -> MoEHandle:
    """Let every token of a transformers MoE model choose its number of experts.

    The model is changed in place: each MoE block becomes a `MoELayer` with the block's own weights
    (the same memory) and a router that starts from its gate. With router "top_k" the outputs stay
    what they were. Convert before the optimizer and `deepspeed.initialize` are made.

    Args:
        model: OLMoE, Mixtral, Qwen2-MoE, Qwen3-MoE, Qwen3-VL-MoE, DeepSeek-V2 (with
            topk_method "greedy"), DeepSeek-OCR-2; the module that you call, which takes
            input_ids [B, S] or inputs_embeds [B, S, D], and attention_mask [B, S].
        router: name of a routing method (`Router.names()` lists them), or its class.
        trainable: "routers", all else is frozen; "experts", these too; "all", the parameters
            keep the `requires_grad` that they have. Routers are float32 and always train.
        **options: of the router, `Router.named(name).Config`, e.g. `k_low=1`.

    Returns:
        The handle: `loss = out.loss + handle.aux_loss()`.

    Raises:
        ConfigError: no MoE block that is known, one that cannot be computed here, an unknown
            router or option, a model that is converted already. The model is unchanged then.

    Source: GeMoE, arXiv 2606.26287, section 3, for the default; docs/routers.md for others.
    """
    if trainable not in ("routers", "experts", "all"):
        raise ConfigError(f"trainable={trainable!r}: one of 'routers', 'experts', 'all' is wanted")
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model={model!r}: a model in memory is wanted, from from_pretrained(...)"
        )
    router_class, config = Router.configured(router, options)
    blocks = _blocks(model)
    _probe(blocks[0], (router_class, config), trainable=trainable != "routers")
    names = [block.stock_names for block in blocks]
    trained = [(b.gate_up_EGD.requires_grad, b.down_EDF.requires_grad) for b in blocks]
    ctx = TokenContext(len(blocks))
    ctx.losses_without_gradient = ctx.trace = True
    layers = convert_blocks(
        blocks, (router_class, config), ctx, BlockWeights(), trainable=trainable != "routers"
    )
    for layer, of_layer in zip(layers, names, strict=True):
        speak_stock(layer, of_layer)
    _freeze(model, layers, trainable, trained)
    before_steps([(layer.router, layer.experts) for layer in layers])
    return MoEHandle(model, ctx, layers)


def _freeze(
    model: nn.Module, layers: list[MoELayer], trainable: str, trained: list[tuple[bool, bool]]
) -> None:
    """All that is not asked for; of experts, with "all", what was frozen before."""
    if trainable == "all":
        for layer, (gate_up, down) in zip(layers, trained, strict=True):
            layer.experts.gate_up_EGD.requires_grad_(gate_up)
            layer.experts.down_EDF.requires_grad_(down)
        return
    ours = {
        id(p) for layer in layers for m in (layer.router, layer.experts) for p in m.parameters()
    }
    for parameter in model.parameters():
        if id(parameter) not in ours:
            parameter.requires_grad_(False)


def _probe(block: BlockSpec, router: tuple[type[Router], Any], *, trainable: bool) -> None:
    """Find out what the router refuses while the model is still as it was."""
    router_class, config = router
    with torch.random.fork_rng(devices=[]):
        probe = router_class(config, block.routing)
    experts = Experts(block.gate_up_EGD.data[:1], block.down_EDF.data[:1], trainable=trainable)
    before_steps([(probe, experts)])


def _blocks(model: nn.Module) -> list[BlockSpec]:
    """ConfigError for a model whose blocks cannot be ours."""
    if any(isinstance(module, MoELayer) for module in model.modules()):
        raise ConfigError("the model is converted already; convert() a model once")
    adapters = {c: a for b in Backbone.known() for c, a in b.block_adapters.items()}
    adapters |= _ADAPTERS
    blocks = find_moe_blocks(model, adapters)
    if not blocks:
        names = sorted(
            {type(m).__name__ for m in model.modules() if "moe" in type(m).__name__.lower()}
        )
        known = ", ".join(sorted(block_class.__name__ for block_class in adapters))
        has = f"it has {', '.join(names[:5])}" if names else f"it is a {type(model).__name__}"
        raise ConfigError(f"no MoE block that is known: {has}; known are {known}")
    for block in blocks:
        for tensor in (block.gate_ED, block.gate_up_EGD, block.down_EDF):
            if tensor.is_meta or not tensor.is_floating_point():
                state = "no memory" if tensor.is_meta else f"dtype {tensor.dtype}"
                raise ConfigError(
                    f"{block.path}: a weight has {state}; load the model whole, in floating point, "
                    "before convert()"
                )
    for section in (model, getattr(model, "config", None), _text_config(model)):
        if getattr(section, "output_router_logits", False):
            raise ConfigError(
                "output_router_logits=True: the stock routers are gone, and with them their load "
                "balance loss; set it to False in model.config, handle.aux_loss() has the new ones"
            )
    return blocks


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
