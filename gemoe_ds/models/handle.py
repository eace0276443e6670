"""MoEHandle: what is asked of a converted model beside its outputs.

Shapes: B sequences, S tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.after_step import after_step
from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.layer import MoELayer
from gemoe_ds.moe.padding import valid_tokens
from gemoe_ds.moe.passes import in_backward
from gemoe_ds.moe.router import Router
from gemoe_ds.moe.step_context import Assign, Read
from gemoe_ds.moe.step_counts import StepCounts

if TYPE_CHECKING:
    from transformers import TrainerCallback

_WAY_OUT = "call handle.begin(is_valid) before the model"


class MoEHandle:
    """Of a model that `convert` has changed.

    Every call of the model tells the MoE layers which tokens are padding (`attention_mask`) and
    which are of an image (the model's image token). A layer that runs in no such call is a
    RuntimeError: call the module that was given to `convert`, not one within it.
    """

    def __init__(self, model: nn.Module, ctx: TokenContext, layers: Sequence[MoELayer]) -> None:
        self.model, self.ctx, self.layers = model, ctx, list(layers)
        self._given: tuple[Tensor, Tensor | None] | None = None  # masks for the next forward
        self._shape = torch.Size([0, 0])
        self._counts = StepCounts(len(self.layers))
        parameters = inspect.signature(model.forward).parameters.values()
        self._names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end, always_call=True)

    def aux_loss(self) -> Tensor:
        """The auxiliary losses of the last forward: `loss = out.loss + handle.aux_loss()`.

        Sum over the losses of weight * mean over the MoE layers (GeMoE, Eq. 13). May be asked
        again until the backward pass; under `torch.no_grad()` it is a value only. Where a step
        adds up several micro-batches, divide it as the rest of the loss.

        Returns:
            A float32 scalar; 0 for a method without auxiliary losses.

        Raises:
            RuntimeError: there is no forward yet; the last one has had its backward pass, or ran
                without gradients; another one, that may still go backward, was not asked.
        """
        self.layers[0].refuse_rollouts()
        return self.ctx.aux_loss()

    def aux_losses(self) -> dict[str, Tensor]:
        """The same by name, without weights and gradient, for the log: float32 scalars."""
        return {name: term.value.detach() for name, term in self.ctx.mean_losses().items()}

    @property
    def k_per_layer(self) -> list[Tensor]:
        """How many experts each token of the last forward got: int64 [B, S] of every MoE layer.

        0 for padding. Raises RuntimeError before the first forward.
        """
        found = [record.k_T for record in self.ctx.layers]
        if any(k_T is None for k_T in found):
            raise RuntimeError("k_per_layer: no forward has run yet, call the model first")
        return [k_T.view(self._shape) for k_T in found if k_T is not None]

    @property
    def routers(self) -> list[Router]:
        """One of every MoE layer, in order of depth."""
        return [layer.router for layer in self.layers]

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter of the model that trains, by name; for an optimizer."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def after_step(
        self,
        step: int,
        total_steps: int,
        *,
        assign_: Assign | None = None,
        read_param: Read | None = None,
    ) -> None:
        """Call after `optimizer.step()`: the routers with a controller or a schedule work here.

        As `MoELayer.after_step`, for all layers together. Collective. Trainer of transformers does
        it by `trainer_callback`. A router that has counted in training for nothing warns when it is
        evaluated.
        """
        layers = [(layer.router, layer.experts) for layer in self.layers]
        after_step(layers, self._counts, step, total_steps, assign_, read_param)

    def trainer_callback(
        self, *, assign_: Assign | None = None, read_param: Read | None = None
    ) -> TrainerCallback:
        """For `Trainer(..., callbacks=[handle.trainer_callback()])`: calls `after_step` there."""
        from gemoe_ds.models.trainer_callback import AfterStep

        return AfterStep(self, assign_, read_param)

    def begin(self, is_valid: Tensor, is_vision: Tensor | None = None) -> None:
        """Say for the next forward which tokens are no padding, and which are of an image.

        Only where its own arguments do not: bool [B, S] both. Without `is_vision` these do.
        """
        self._given = is_valid, is_vision

    def load_routers(self, folder: str | Path) -> None:
        """The routers that `model.save_pretrained` (or Trainer) wrote into a folder.

        With its other weights, `from_pretrained` of the stock class has read the gates; what the
        routers have more it leaves. Raises ConfigError for a folder without these routers.
        """
        if not Path(folder).is_dir():
            raise ConfigError(f"{folder}: no such folder")
        found: dict[str, Tensor] = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                names = [name for name in tensors.keys() if ".router." in name]  # noqa: SIM118
                found |= {_from_layer(name): tensors.get_tensor(name) for name in names}
        state = self.model.state_dict()
        wanted = {_from_layer(name): t for name, t in state.items() if ".router." in name}
        for name in sorted(wanted.keys() | found.keys()):
            shapes = [tuple(side[name].shape) if name in side else "no" for side in (found, wanted)]
            if shapes[0] != shapes[1]:
                raise ConfigError(
                    f"{folder}: {shapes[0]} router {name}, the model has {shapes[1]}: give a "
                    "folder that this model saved, and convert() the options that it had"
                )
        with torch.no_grad():
            for name, tensor in wanted.items():
                tensor.copy_(found[name])

    @torch.compiler.disable
    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward():  # the whole model is recomputed: its layers find the forward it was
            return
        if model.training:
            self._refuse_narrow_routers()
        given = dict(zip(self._names, args, strict=False)) | kwargs
        if given.get("output_router_logits"):
            raise RuntimeError(
                "output_router_logits=True: the stock routers are gone; handle.aux_loss() and "
                "handle.aux_losses() have the losses of the new ones"
            )
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if tokens is None or tokens.dim() < 2:
            raise RuntimeError(
                f"{type(model).__name__} is called without input_ids or inputs_embeds: give "
                "convert() the module that takes them"
            )
        shape, device = tokens.shape[:2], tokens.device
        if self._given is None:
            is_valid_BS, is_vision_BS = valid_tokens(given, shape, _WAY_OUT), None
        else:
            is_valid_BS, is_vision_BS = self._given
            self._given = None
        if is_vision_BS is None:
            is_vision_BS = self._vision(given, shape)
        if is_vision_BS is None:
            is_vision_BS = torch.zeros(shape, dtype=torch.bool, device=device)
        for mask in (is_valid_BS, is_vision_BS):
            if mask is not None and mask.shape != shape:
                raise RuntimeError(
                    f"a mask of shape {list(mask.shape)} for tokens of shape {list(shape)}"
                )
        self._shape = shape
        valid_BS = None if is_valid_BS is None else is_valid_BS.to(device) != 0
        self.ctx.begin(valid_BS, is_vision_BS.to(device) != 0)

    def _refuse_narrow_routers(self) -> None:
        """DeepSpeed's bf16 and fp16 write into every parameter; `model.to` lets routers be."""
        parameters = (p for router in self.routers for p in router.parameters())
        for dtype in (p.dtype for p in parameters if p.requires_grad and p.itemsize < 4):
            raise RuntimeError(
                f"the routers have become {dtype}, and train in float32: leave bf16 and fp16 out "
                "of DeepSpeed's configuration, and load the model with dtype=torch.bfloat16 before "
                "convert(), which keeps it for all but the routers"
            )

    @torch.compiler.disable
    def _end(self, model: nn.Module, args: object, output: object) -> None:
        if in_backward():
            return
        self.ctx.end(failed=output is None)
        if self.model.training and torch.is_grad_enabled() and output is not None:
            self._counts.add(self.ctx)
        elif not self.model.training:
            self._counts.warn_if_unread(self.layers[0].router.name)

    def _vision(self, given: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
        config = getattr(self.model, "config", None)
        names = ("image_token_id", "video_token_id")
        known = [i for name in names if (i := getattr(config, name, None)) is not None]
        if not known:
            return None
        if (kinds_BS := given.get("mm_token_type_ids")) is not None:
            return torch.as_tensor(kinds_BS)[:, -shape[1] :] > 0
        if (ids_BS := given.get("input_ids")) is None:
            raise RuntimeError(
                "a vision-language model is called with inputs_embeds alone: call "
                "handle.begin(is_valid, is_vision) before, which says what is of an image"
            )
        return torch.isin(ids_BS, torch.tensor(known, device=ids_BS.device))


def _from_layer(name: str) -> str:
    """A folder may name the modules above the decoder layers as an older class did."""
    _, layers, rest = name.partition(".layers.")
    return f"layers.{rest}" if layers else name
