"""Backbone: an adapter that says where a model's MoE blocks are; it re-implements no forward."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from gemoe_ds.moe.router import RoutingSpec
from gemoe_ds.registry import ConfigModel, Registered


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

    @property
    def expert_names(self) -> tuple[str, str]:
        """What the block itself calls gate_up_EGD and down_EDF; asked before it is replaced."""
        block = getattr(self.parent, self.attribute)
        names = {id(parameter): name for name, parameter in block.named_parameters()}
        return names[id(self.gate_up_EGD)], names[id(self.down_EDF)]

    @property
    def params_per_expert(self) -> int:
        return (self.gate_up_EGD.numel() + self.down_EDF.numel()) // self.routing.num_experts


class Backbone(Registered):
    """One model family. An instance is cheap: it holds options and knows how to load and read."""

    name: ClassVar[str]

    def __init__(self, config: ConfigModel) -> None:
        self.config = config

    @abstractmethod
    def load(self, checkpoint: Path | None, tokenizer_dir: Path) -> nn.Module:
        """The float32 transformers model: from a Hugging Face folder, or freshly initialised.

        Raises ConfigError for options that contradict the folder, CheckpointError for a folder
        that is missing, damaged or of another family.
        """

    @abstractmethod
    def moe_blocks(self, model: nn.Module) -> list[BlockSpec]:
        """Every MoE block in order of depth; never empty."""

    @abstractmethod
    def image_spec(self, model: nn.Module) -> ImageSpec:
        """What the collator must know to lay an image into a sequence."""

    @abstractmethod
    def hidden(
        self, model: nn.Module, input_ids_BS: Tensor, is_valid_BS: Tensor, pixels_NCHW: Tensor
    ) -> Tensor:
        """The last hidden states [B, S, D] through the model's own forward."""

    @abstractmethod
    def head(self, model: nn.Module) -> nn.Module:
        """The module from hidden states to vocabulary logits."""

    @abstractmethod
    def checkpoint_key(self, name: str) -> str:
        """The Hugging Face key of a parameter of the converted model (`...router.gate.weight`)."""

    def save_pretrained(self, model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
        """Write a converted model, all of whose experts are here, as a Hugging Face folder."""
        mapped = {self.checkpoint_key(name): tensor for name, tensor in state.items()}
        with torch.device("meta"):
            plain = type(model)(model.config)  # type: ignore[call-arg]
        plain.load_state_dict(mapped, strict=True, assign=True)
        plain.save_pretrained(folder)

    def save_trained(
        self, model: nn.Module, state: dict[str, Tensor], base: Path | None, folder: Path
    ) -> None:
        """Write `base` with the tensors of `state` replaced; all others as they are stored there.

        `state` is by parameter name of the converted model, without what only our routers have.
        Without a base every parameter must be in it.
        """
        if base is None:
            self.save_pretrained(model, state, folder)
            return
        plain = type(model).from_pretrained(base, dtype="auto")  # type: ignore[attr-defined]
        for name, tensor in state.items():
            plain.get_parameter(self.checkpoint_key(name)).data = tensor
        plain.save_pretrained(folder)


@dataclass(frozen=True)
class ImageSpec:
    """One image is `size` x `size` pixels and stands for `tokens` placeholders of id `token_id`."""

    size: int
    tokens: int
    token_id: int
