"""What a vision tower and its connector hold, found by running them on tensors without memory.

The model's own code runs on the meta device up to the language model, for the shapes of a batch:
each tensor that it makes is counted from its birth to its death. Nothing is computed, so that a
meta model at full size serves, and no formula has to follow what each family's code keeps.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.inputs import ModelInputs


class _Reached(Exception):
    """The language model is called: the tower is done."""


class _Counted(TorchDispatchMode):
    """Bytes that live on the meta device, now and at most. What meets them there goes there too."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        """`there`: weights and inputs, of which views are made; they are not counted."""
        super().__init__()
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found: list[Tensor] = []
        tree_map(lambda a: found.append(a) if isinstance(a, Tensor) else None, (args, kwargs))
        if any(t.is_meta for t in found):
            args, kwargs = tree_map(_to_meta, (args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        tree_map(self._count, out)
        return out

    def _count(self, tensor: Any) -> None:
        if not isinstance(tensor, Tensor) or not tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _InOneKernel(TorchFunctionMode):
    """Attention without its scores, as CPUs and GPUs compute it; the meta device would not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])[0]
        return func(*args, **(kwargs or {}))


def tower_bytes(
    backbone: Backbone,
    hf: nn.Module,
    text: nn.Module,
    inputs: ModelInputs,
    dtype: torch.dtype,
    *,
    trains: bool,
    activation_checkpointing: bool,
) -> tuple[int, int]:
    """At most at once, and while the language model runs; on these inputs.

    The batch itself is not counted. `trains`: with all that the backward pass needs, and with it.
    """
    model, text = _meta_model_of(hf, text, dtype, trains)
    if trains and activation_checkpointing:
        again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _InOneKernel())}
        model.gradient_checkpointing_enable(again)  # type: ignore[operator]
    images = dict(inputs.images)
    images["pixels"] = images["pixels"].to("meta")
    counted = _Counted([*model.parameters(), images["pixels"]])
    kept = 0

    def reached(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal kept
        kept = counted.now
        embedded = kwargs["inputs_embeds"]
        if trains:
            embedded.backward(torch.empty_like(embedded))
        raise _Reached

    text.register_forward_pre_hook(reached, with_kwargs=True)
    with suppress(_Reached), torch.set_grad_enabled(trains), _InOneKernel(), counted:
        backbone.hidden(model, replace(inputs, images=images))
    return counted.most, kept


def _meta_model_of(
    hf: nn.Module, text: nn.Module, dtype: torch.dtype, trains: bool
) -> tuple[nn.Module, nn.Module]:
    """A copy whose parameters have no memory, and its language model."""
    memo: dict[int, Any] = {}
    of_text = {id(p) for p in text.parameters()}
    for p in hf.parameters():
        seen = trains and id(p) not in of_text
        without_memory = nn.Parameter(
            torch.empty_like(p, device="meta", dtype=dtype), requires_grad=seen
        )
        if seen:
            without_memory.register_post_accumulate_grad_hook(_forget_gradient)
        memo[id(p)] = without_memory
    path = next(name for name, module in hf.named_modules() if module is text)
    model = copy.deepcopy(hf, memo).train()
    return model, model.get_submodule(path)


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _to_meta(value: Any) -> Any:
    """Where a mask chooses rows, it has been counted before it loses its values."""
    if not isinstance(value, Tensor) or value.is_meta or value.dim() == 0:
        return value
    return value.to("meta")
