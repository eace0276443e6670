"""The exported model: the stock architecture whose MoE blocks route as they did in training.

`gemoe export` writes this file, and the modules of gemoe_ds that it imports, into the exported
folder; there it needs torch, transformers and pydantic, but neither gemoe_ds nor DeepSpeed.
"""

from __future__ import annotations

import inspect
from functools import partial
from types import MethodType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration as Stock
from transformers.utils.hub import cached_file

from gemoe_ds.export.hub import where
from gemoe_ds.export.image_rows import aligned
from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.dispatch import LocalDispatcher, known_sizes
from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.padding import valid_tokens
from gemoe_ds.moe.router import Router, RoutingSpec

ROUTERS = "routers.safetensors"  # every router's parameters, float32


class GemoeForConditionalGeneration(Stock):
    """The stock model; `from_pretrained` replaces the forward of its MoE blocks.

    `k_per_layer` holds, after a forward, how many experts every token of every MoE layer got.
    Routing is computed in float32 whatever the dtype of the model, as in training.
    """

    ctx: TokenContext
    _batch_size: int
    _names: list[str]  # of what its forward takes by position

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        # Loaded as the stock class and then made ours: transformers maps the names in a checkpoint
        # for its own classes only.
        folder = pretrained_model_name_or_path
        loaded: Any = Stock.from_pretrained(folder, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        described = model.config.gemoe
        if "stop_ids" in described:
            model.generation_config.eos_token_id = described["stop_ids"]
            model.generation_config.pad_token_id = described["pad_id"]
        if not described.get("enabled", True):
            return loaded
        model.__class__ = cls
        file = cached_file(
            folder, ROUTERS, subfolder=kwargs.get("subfolder") or "", **where(kwargs)
        )
        assert file is not None  # or it has raised
        model.attach_routers(load_file(file))
        return loaded

    def attach_routers(self, tensors: dict[str, Tensor]) -> None:
        """Put the trained routers before the experts of every MoE block that the config lists."""
        described = self.config.gemoe
        router_class = Router.named(described["router"]["name"])
        options = {k: v for k, v in described["router"].items() if k != "name"}
        self.ctx = TokenContext(len(described["blocks"]))
        for slot, entry in enumerate(described["blocks"]):
            block = self.get_submodule(getattr(self, "blocks_below", "") + entry["path"])
            spec = RoutingSpec(**entry["routing"])
            router = router_class(router_class.Config(**options), spec)
            prefix = f"{slot}."
            own = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            router.load_state_dict(own)
            router.requires_grad_(False).to(next(block.parameters()).device)
            block.gemoe_router = router
            block.gemoe_experts = _BlockExperts(block, entry["gate_up"], entry["down"])
            block.forward = MethodType(_block_forward(self.ctx, entry.get("shared")), block)
        self._names = list(inspect.signature(self.forward).parameters)
        self.register_forward_pre_hook(_begin, with_kwargs=True)

    @property
    def k_per_layer(self) -> list[Tensor]:
        """k of every token of the last forward, int64 [B, S] a layer; 0 for padding."""
        masks = (record.mask_TE for record in self.ctx.layers)
        return [mask.sum(1).view(self._batch_size, -1) for mask in masks if mask is not None]


@torch.compiler.disable
def _begin(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Tell the layers which tokens of this forward are padding and which are of an image.

    With a cache only the new tokens come; the mask covers the old ones too.
    """
    given = dict(zip(model._names, args, strict=False)) | kwargs
    ids = given.get("input_ids")
    tokens = given["inputs_embeds"] if ids is None else ids
    shape, device = tokens.shape[:2], tokens.device
    is_valid_BS = valid_tokens(given, shape, "give one with a number for each, [batch, tokens]")
    is_vision_BS = torch.zeros(shape, dtype=torch.bool, device=device)
    if (rows := given.get("image_rows")) is not None:
        is_vision_BS = aligned(rows.to(device), shape[1]) != -1
    elif image_tokens := model.config.gemoe.get("image_tokens"):
        if ids is None:
            raise RuntimeError(
                "a vision-language model is called with inputs_embeds alone: give input_ids, "
                "which say what is of an image"
            )
        is_vision_BS = torch.isin(ids, torch.tensor(image_tokens, device=device))
    model._batch_size = shape[0]
    model.ctx.begin(None if is_valid_BS is None else is_valid_BS.to(device), is_vision_BS)


def _block_forward(ctx: TokenContext, shared: str | None) -> Any:
    """`shared`: what the block calls its experts that every token visits."""
    dispatcher = LocalDispatcher()

    def forward(block: Any, hidden_states: Tensor) -> Tensor:
        x_TD = ctx.without_padding(hidden_states.reshape(-1, hidden_states.shape[-1]))
        router = block.gemoe_router
        decision, logits_TE = router.decide(x_TD, ctx)
        record = router.record_of(ctx)
        record.logits_TE, record.mask_TE = logits_TE, router.split(decision.mask_TE)[0]
        writes = not (block.training or torch.is_grad_enabled())
        sizes = known_sizes(router, ctx, writes=writes)
        weights_TE, _ = router.split(decision.weights_TE)
        preprocessed = dispatcher.dispatch_preprocess(router.dispatched(decision), sizes)
        free = partial(router.free_output, decision=decision)
        y_TD = dispatcher(x_TD, weights_TE, preprocessed, block.gemoe_experts.forward, free)
        if shared is not None:
            y_TD = y_TD + block.get_submodule(shared)(x_TD)
        return y_TD.view(hidden_states.shape)

    return forward


class _BlockExperts(Experts):
    """The block's own expert weights, wherever they are moved to."""

    _names: tuple[nn.Module, str, str]

    def __init__(self, block: nn.Module, gate_up: str, down: str) -> None:
        nn.Module.__init__(self)
        # not as a submodule: the block holds this one
        object.__setattr__(self, "_names", (block, gate_up, down))
        self.pack = False  # whoever loads the model says how much memory it may take, not we

    @property
    def gate_up_EGD(self) -> Tensor:  # type: ignore[override]
        block, gate_up, _ = self._names
        return block.get_parameter(gate_up)

    @property
    def down_EDF(self) -> Tensor:  # type: ignore[override]
        block, _, down = self._names
        return block.get_parameter(down)
