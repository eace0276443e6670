"""Dense vision-language models turned into MoE ones: MoE-LLaVA's sparse upcycling.

LTDR, DynMoE and EvoMoE train such models: every other FFN becomes E copies of itself, and routers
and experts (`model.trainable: experts`) are tuned. From a dense folder the copies are made while it
is loaded; what a run has trained, exported, is a folder of this family and is loaded as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from gemoe_ds.errors import CheckpointError, ConfigError
from gemoe_ds.hf_io.hf_config import as_checkpoint_error, read_config
from gemoe_ds.hf_io.key_rules import KeyMap, Rule, expert_tables
from gemoe_ds.hf_io.quiet import without_report
from gemoe_ds.hf_io.targets import problem_of
from gemoe_ds.models.backbone import HFModel
from gemoe_ds.models.blocks import Adapters
from gemoe_ds.models.llava import LlavaBackbone
from gemoe_ds.models.upcycled.model import (
    UpcycledLlavaForConditionalGeneration,
    UpcycledMoEBlock,
    by_new_names,
)
from gemoe_ds.moe.layer import MoELayer
from gemoe_ds.moe.router import RoutingSpec
from gemoe_ds.registry import ConfigModel


def _upcycled_block(block: UpcycledMoEBlock) -> dict[str, Any]:
    experts = block.experts
    num_experts, _, d_model = experts.gate_up_proj.shape
    return {
        "routing": RoutingSpec(d_model, num_experts, block.top_k, block.norm_topk_prob),
        "gate_ED": block.gate.weight,
        "gate_up_EGD": experts.gate_up_proj,
        "down_EDF": experts.down_proj,
    }


UPCYCLED_BLOCKS: Adapters = {UpcycledMoEBlock: _upcycled_block}


class UpcycledBackbone(LlavaBackbone):
    """A LLaVA whose language model has SwiGLU FFNs (Llama, Qwen2, Mistral, ...), upcycled."""

    name: ClassVar[str] = "upcycled"
    block_adapters = UPCYCLED_BLOCKS
    # as transformers saves our class; what it does not know, it names as in memory
    keys = KeyMap(
        (Rule("model.language_model.model.{*}", "model.language_model.{*}"),),
        experts=expert_tables(
            "model.language_model.model.layers.{l}.mlp.experts",
            "model.language_model.layers.{l}.mlp.experts",
            published="fused",
        ),
    )

    class Config(ConfigModel):
        num_experts: int = Field(4, ge=1, description="experts of a block, copies of its FFN")
        top_k: int = Field(2, ge=1, description="experts a token, for static routing")
        every: int = Field(2, ge=1, description="every n-th layer gets an MoE block")
        first: int = Field(0, ge=0, description="first layer that gets an MoE block")
        norm_topk_prob: bool | None = Field(
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
            return self.meta_model(checkpoint, UpcycledLlavaForConditionalGeneration)
        dense = self._read_dense(checkpoint)
        return UpcycledLlavaForConditionalGeneration.from_dense(
            dense, self._wanted(dense, checkpoint)
        )

    def _read_dense(self, folder: Path) -> LlavaForConditionalGeneration:
        """The whole float32 model, by transformers, which knows the key names of every version."""
        self.meta_model(folder)
        with as_checkpoint_error(folder, "cannot be read"), without_report():
            loaded: Any = LlavaForConditionalGeneration.from_pretrained(  # typed without its report
                folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
        model: LlavaForConditionalGeneration
        model, report = loaded
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report.get(problem):
                raise CheckpointError(
                    f"model.checkpoint={folder}: {problem.replace('_', ' ')}: "
                    f"{sorted(map(str, report[problem]))[:3]}; it is not a complete LLaVA"
                )
        for name, parameter in model.named_parameters():
            if wrong := problem_of(parameter.detach()):
                raise CheckpointError(f"model.checkpoint={folder}: {name} {wrong}")
        return model

    def _wanted(self, dense: HFModel, folder: Path) -> dict[str, object]:
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
        norm_topk_prob = (
            config.top_k > 1 if config.norm_topk_prob is None else config.norm_topk_prob
        )
        return {
            "layers": chosen,
            "num_experts": config.num_experts,
            "top_k": config.top_k,
            "norm_topk_prob": norm_topk_prob,
        }

    def _refuse_contradictions(self, stored: dict[str, object], folder: Path) -> None:
        for field in self.config.model_fields_set & stored.keys():
            if getattr(self.config, field) not in (None, stored[field]):
                raise ConfigError(
                    f"model.backbone.{field}={getattr(self.config, field)}, but {folder} is "
                    f"upcycled already, with {stored[field]}; leave it out"
                )

    def save_trained(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        base: Path | None,
        folder: Path,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """`base` may be the dense model, which has no gates: they are the run's, frozen or not."""
        assert base is not None
        if _stored(base) is not None:
            super().save_trained(model, state, base, folder, share)
            return
        if share[0] != 0:
            return
        gates = {
            f"{path}.gate.weight": layer.router.gate.weight.detach()
            for path, layer in model.named_modules()
            if isinstance(layer, MoELayer)
        }
        whole = self.load(base, base).state_dict() | gates | dict(state)
        self.save_pretrained(model, whole, folder)

    def save_quantised(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        base: Path,
        folder: Path,
        format_of: Mapping[str, str],
    ) -> None:
        if _stored(base) is None:
            raise ConfigError(
                f"model.checkpoint={base} is a dense model; export the run without --quantise, and "
                "then that folder with it"
            )
        super().save_quantised(model, state, base, folder, format_of)


def _stored(folder: Path) -> dict[str, object] | None:
    """`config.upcycled` of a folder; None for a dense model."""
    found = read_config(folder).get("upcycled")
    return by_new_names(found) if isinstance(found, dict) else None
