"""A converted model's state_dict has the names of the stock model, and all of its weights.

So `save_pretrained`, `Trainer` and `torch.save` write what the stock class reads, and beside it
what the routers have more (`...mlp.router.eap.weight`); `load_state_dict` takes either back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemoe_ds.moe.layer import MoELayer


def speak_stock(layer: MoELayer, names: dict[str, str]) -> None:
    """Let the state_dict of a layer have these names, frozen experts included."""
    frozen = {ours for ours in names if ours in dict(layer.named_buffers())}

    def after(layer: Any, state: dict[str, Any], prefix: str, metadata: object) -> None:
        for ours, theirs in names.items():
            tensor = layer.get_buffer(ours) if ours in frozen else state.pop(prefix + ours, None)
            if tensor is not None:
                state[prefix + theirs] = tensor

    @torch.no_grad()
    def before(layer: Any, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        missing, errors = rest[2], rest[4]
        for ours, theirs in names.items():
            tensor = state.pop(prefix + theirs, None)
            if ours not in frozen:
                if tensor is not None:
                    state[prefix + ours] = tensor
            elif tensor is None:
                missing.append(prefix + theirs)
            elif tensor.shape != layer.get_buffer(ours).shape:
                errors.append(f"size mismatch for {prefix}{theirs}: {list(tensor.shape)}")
            else:
                layer.get_buffer(ours).copy_(tensor)

    for ours, theirs in names.items():
        if ours.startswith("experts."):  # transformers looks up the shape of what it transposes
            shape = getattr(layer.experts, ours.removeprefix("experts.")).shape
            alias = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
            layer.experts.__dict__[theirs.rpartition(".")[2]] = alias  # not registered
    layer.register_state_dict_post_hook(after)
    layer.register_load_state_dict_pre_hook(before)
