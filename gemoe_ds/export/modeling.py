"""The exported model: the stock architecture whose MoE blocks route as they did in training.

`gemoe export` writes this file, and the modules of gemoe_ds that it imports, into the exported
folder; there it needs torch, transformers and pydantic, but neither gemoe_ds nor DeepSpeed.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration as Stock
from transformers.utils.hub import cached_file

from gemoe_ds.export.block import RoutedBlock
from gemoe_ds.export.contexts import Contexts
from gemoe_ds.export.hub import where
from gemoe_ds.export.image_rows import aligned
from gemoe_ds.export.saving import ROUTERS, add_to_saved, router_prefixes, routers_in
from gemoe_ds.hf_io.safetensors_reader import INDEX
from gemoe_ds.moe.padding import valid_tokens
from gemoe_ds.moe.passes import in_backward
from gemoe_ds.moe.router import Router, RoutingSpec


class GemoeForConditionalGeneration(Stock):
    """The stock model; `from_pretrained` replaces the forward of its MoE blocks.

    `k_per_layer` holds, after a forward, how many experts every token of every MoE layer got.
    Routing is computed in float32 whatever the dtype of the model, as in training.
    """

    contexts: Contexts
    _names: list[str]  # of what its forward takes by position

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Not run by `from_pretrained`: the model of a config alone has no routers yet."""
        super().__init__(config, *args, **kwargs)
        if config.gemoe.get("enabled", True):
            self.register_forward_pre_hook(_refuse_without_routers)

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
        enabled = described.get("enabled", True)
        if not isinstance(enabled, bool):
            raise ValueError(f"config.json: gemoe.enabled={enabled!r}; it is true or false")
        if not enabled:
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
        self.contexts = Contexts(len(described["blocks"]))
        for slot, entry in enumerate(described["blocks"]):
            block = self.get_submodule(getattr(self, "blocks_below", "") + entry["path"])
            spec = RoutingSpec(**entry["routing"])
            router = router_class(router_class.Config(**options), spec)
            prefix = f"{slot}."
            own = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            router.load_state_dict(own)
            RoutedBlock(block, router, self.contexts, entry).take_over()
        prefixes = tuple(router_prefixes(self))
        ours = [name for name in self.state_dict() if name.startswith(prefixes)]
        self._keys_to_ignore_on_save = [*(self._keys_to_ignore_on_save or ()), *ours]
        self._names = list(inspect.signature(self.forward).parameters)
        self.register_forward_pre_hook(_begin, with_kwargs=True)
        self.register_forward_hook(_end, always_call=True)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """A folder that loads as the exported one does: weights, routers, config and code.

        Tokenizer and processor stay in the exported folder. ValueError for `push_to_hub`.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "push_to_hub=True would leave out the routers: save to a folder, then "
                "model.push_to_hub(NAME)"
            )
        state = self.state_dict() if state_dict is None else state_dict
        routers, named = routers_in(state, router_prefixes(self)), self.config.architectures
        folder = Path(save_directory)
        if is_main_process:
            (folder / INDEX).unlink(missing_ok=True)  # of an earlier save into this folder
        try:
            super().save_pretrained(folder, is_main_process, state_dict, **kwargs)
        finally:
            self.config.architectures = named
        if is_main_process:
            add_to_saved(folder, self, routers)

    @property
    def k_per_layer(self) -> list[Tensor]:
        """k of every token of the last forward of this thread, int64 [B, S] a layer; 0 for
        padding. RuntimeError if there was none."""
        return self.contexts.k_per_layer


@torch.compiler.disable
def _begin(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Tell the layers which tokens of this forward are padding and which are of an image.

    With a cache only the new tokens come; the mask covers the old ones too.
    """
    if in_backward():  # the whole model is recomputed: its blocks find the forward it was
        return
    given = dict(zip(model._names, args, strict=False)) | kwargs
    _refuse_router_logits(model.config, given.get("output_router_logits"))
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
    model.contexts.begin(None if is_valid_BS is None else is_valid_BS.to(device), is_vision_BS)


def _refuse_without_routers(model: Any, args: tuple) -> None:
    if not hasattr(model, "contexts"):
        raise RuntimeError(
            "this model was made from its config, without the trained routers: load it by "
            "from_pretrained(FOLDER, trust_remote_code=True)"
        )


def _refuse_router_logits(config: Any, asked: bool | None) -> None:
    """Where they are asked for, by an argument or, if there is none, in config.json."""
    if asked is None:
        parts = config, getattr(config, "text_config", None)
        asked = any(getattr(part, "output_router_logits", False) for part in parts)
    if asked:
        raise RuntimeError(
            "output_router_logits=True, as an argument or in config.json: the stock routers do not "
            "run, so there are no logits of theirs and no auxiliary loss; make it False"
        )


@torch.compiler.disable
def _end(model: Any, args: tuple, output: Any) -> None:
    if not in_backward():
        model.contexts.own.end(failed=output is None)
