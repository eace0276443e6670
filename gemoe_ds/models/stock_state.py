"""A converted model's state_dict has the names of the stock model, and all of its weights.

So `save_pretrained`, `Trainer` and `torch.save` write what the stock class reads, and beside it
what the routers have more (`...mlp.router.eap.weight`); `load_state_dict` takes either back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemoe_ds.moe.layer import MoELayer


def speak_stock(layer: MoELayer, names: dict[str, str]) -> None:
    """Let a layer's state_dict have these names: what it calls a tensor -> what the block did."""
    buffers = dict(layer.named_buffers())
    frozen = {ours for ours in names if ours in buffers}  # which state_dict leaves out
    for ours, theirs in names.items():
        if ours.startswith("experts."):  # transformers looks up the shape of what it transposes
            shape = getattr(layer.experts, ours.removeprefix("experts.")).shape
            alias = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
            layer.experts.__dict__[theirs.rpartition(".")[2]] = alias  # not registered
    layer.register_state_dict_post_hook(_ToStock(names, frozen))
    layer.register_load_state_dict_pre_hook(_FromStock(names, frozen))


@dataclass
class _ToStock:
    """A hook that can be copied and pickled with the model."""

    names: dict[str, str]
    frozen: set[str]

    def __call__(self, layer: Any, state: dict[str, Any], prefix: str, metadata: object) -> None:
        for ours, theirs in self.names.items():
            frozen = ours in self.frozen
            tensor = layer.get_buffer(ours) if frozen else state.pop(prefix + ours, None)
            if tensor is not None:
                state[prefix + theirs] = tensor


@dataclass
class _FromStock:
    names: dict[str, str]
    frozen: set[str]

    @torch.no_grad()
    def __call__(self, layer: Any, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        _, _, missing, _, errors = rest
        for ours, theirs in self.names.items():
            tensor = state.pop(prefix + theirs, None)
            if ours not in self.frozen:
                if tensor is not None:
                    state[prefix + ours] = tensor
            elif tensor is None:
                missing.append(prefix + theirs)
            elif tensor.shape != layer.get_buffer(ours).shape:
                errors.append(f"size mismatch for {prefix}{theirs}: {list(tensor.shape)}")
            else:
                layer.get_buffer(ours).copy_(tensor)
