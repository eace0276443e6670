"""Dense vision-language models turned into MoE ones: MoE-LLaVA's sparse upcycling.

LTDR, DynMoE and EvoMoE train such models: every other FFN becomes E copies of itself, and routers
and experts (`model.train: experts`) are tuned. From a dense folder the copies are made while it is
loaded; what a run has trained, exported, is a folder of this family and is loaded as it is.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from gemoe_ds.backbones.backbone import BlockSpec
from gemoe_ds.backbones.llava import LlavaBackbone
from gemoe_ds.backbones.upcycled_model import (
    UpcycledLlavaForConditionalGeneration,
    UpcycledMoEBlock,
)
from gemoe_ds.errors import CheckpointError, ConfigError
from gemoe_ds.moe.router import RoutingSpec
from gemoe_ds.registry import ConfigModel

_KEY_RULES = (  # converted model -> upcycled_model.py
    (r"\.mlp\.router\.gate\.weight$", ".mlp.gate.weight"),
    (r"\.mlp\.experts\.gate_up_EGD$", ".mlp.experts.gate_up_proj"),
    (r"\.mlp\.experts\.down_EDF$", ".mlp.experts.down_proj"),
)


class UpcycledBackbone(LlavaBackbone):
    """A LLaVA whose language model has SwiGLU FFNs (Llama, Qwen2, Mistral, ...), upcycled."""

    name: ClassVar[str] = "upcycled"

    class Config(ConfigModel):
        num_experts: int = Field(4, ge=1, description="copies of each FFN")
        top_k: int = Field(2, ge=1, description="experts a token, for static routing")
        every: int = Field(2, ge=1, description="an MoE block in every so many layers")
        first: int = Field(0, ge=0, description="the first layer that gets one")
        renormalise: bool | None = Field(
            None, description="divide the chosen scores by their sum; null: if top_k > 1"
        )

    config: Config

    def load(self, checkpoint: Path | None, tokenizer_dir: Path) -> nn.Module:
        if checkpoint is None:
            raise ConfigError(
                "model.checkpoint: backbone 'upcycled' starts from a dense model; give its folder"
            )
        stored = _stored(checkpoint)
        if stored is not None:
            self._refuse_contradictions(stored, checkpoint)
            return self.read(checkpoint, UpcycledLlavaForConditionalGeneration)
        dense = self.read(checkpoint)
        return UpcycledLlavaForConditionalGeneration.from_dense(
            dense, self._wanted(dense, checkpoint)
        )

    def _wanted(self, dense: nn.Module, folder: Path) -> dict[str, object]:
        config = self.config
        layers = dense.model.language_model.layers
        chosen = list(range(config.first, len(layers), config.every))
        if not chosen:
            raise ConfigError(
                f"model.backbone.first={config.first}: {folder} has {len(layers)} layers"
            )
        if config.top_k > config.num_experts:
            raise ConfigError(
                f"model.backbone.top_k={config.top_k} exceeds num_experts={config.num_experts}"
            )
        projections = {f"{name}_proj.weight" for name in ("gate", "up", "down")}
        for layer in chosen:
            have = set(layers[layer].mlp.state_dict())
            if have != projections:
                raise CheckpointError(
                    f"model.checkpoint={folder}: the FFN of layer {layer} has {sorted(have)}; "
                    f"upcycling copies SwiGLU FFNs without biases, {sorted(projections)}"
                )
        renormalise = config.top_k > 1 if config.renormalise is None else config.renormalise
        return {
            "layers": chosen,
            "num_experts": config.num_experts,
            "top_k": config.top_k,
            "renormalise": renormalise,
        }

    def _refuse_contradictions(self, stored: dict[str, object], folder: Path) -> None:
        for field in self.config.model_fields_set & stored.keys():
            if getattr(self.config, field) not in (None, stored[field]):
                raise ConfigError(
                    f"model.backbone.{field}={getattr(self.config, field)}, but {folder} is "
                    f"upcycled already, with {stored[field]}; leave it out"
                )

    def moe_blocks(self, model: nn.Module) -> list[BlockSpec]:
        blocks = []
        for path, module in model.named_modules():
            if isinstance(module, UpcycledMoEBlock):
                parent_path, _, attribute = path.rpartition(".")
                experts = module.experts
                num_experts, _, d_model = experts.gate_up_proj.shape
                blocks.append(
                    BlockSpec(
                        path,
                        model.get_submodule(parent_path),
                        attribute,
                        RoutingSpec(d_model, num_experts, module.top_k, module.renormalise),
                        module.gate.weight,
                        experts.gate_up_proj,
                        experts.down_proj,
                    )
                )
        return blocks

    def checkpoint_key(self, name: str) -> str:
        for pattern, replacement in _KEY_RULES:
            name = re.sub(pattern, replacement, name)
        return name

    def save_trained(
        self, model: nn.Module, state: dict[str, Tensor], base: Path | None, folder: Path
    ) -> None:
        """`base` may be the dense model: gates and experts are in `state` then."""
        assert base is not None
        plain = self.load(base, base)
        for name, tensor in state.items():
            plain.get_parameter(self.checkpoint_key(name)).data = tensor
        plain.save_pretrained(folder)  # type: ignore[operator]


def _stored(folder: Path) -> dict[str, object] | None:
    """`config.upcycled` of a folder; None for a dense model, or for what `read` will refuse."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("upcycled")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
