"""A dense LLaVA some of whose FFNs have become MoE blocks: a model of transformers' own making
otherwise, saved and loaded like one.

Shapes: T tokens, D model, F width of an FFN, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration


def by_new_names(upcycled: dict[str, Any]) -> dict[str, Any]:
    """What config.json says under `upcycled`; folders of 0.1 have an older name."""
    return {{"renormalise": "norm_topk_prob"}.get(k, k): v for k, v in upcycled.items()}


class UpcycledExperts(nn.Module):
    """E stacked SwiGLU FFNs, in the layout of transformers' MoE models."""

    def __init__(self, num_experts: int, d_model: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, d_model))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_model, width))


class UpcycledMoEBlock(nn.Module):
    """Static top-k of E experts; the plain computation, which training replaces by its own."""

    def __init__(self, config: dict[str, Any], d_model: int, width: int) -> None:
        super().__init__()
        self.top_k = int(config["top_k"])
        self.norm_topk_prob = bool(config.get("norm_topk_prob"))
        self.gate = nn.Linear(d_model, int(config["num_experts"]), bias=False)
        self.experts = UpcycledExperts(int(config["num_experts"]), d_model, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.flatten(0, -2)
        weights_TK, chosen_TK = self.gate(x_TD).float().softmax(-1).topk(self.top_k)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        y_TD = torch.zeros_like(x_TD)
        for expert in range(self.gate.out_features):
            tokens, rank = (chosen_TK == expert).nonzero(as_tuple=True)
            gate, up = (x_TD[tokens] @ self.experts.gate_up_proj[expert].t()).chunk(2, dim=-1)
            out = (nn.functional.silu(gate) * up) @ self.experts.down_proj[expert].t()
            y_TD.index_add_(0, tokens, (out * weights_TK[tokens, rank, None]).to(y_TD.dtype))
        return y_TD.view_as(hidden_states)


class UpcycledLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """`config.upcycled` says which layers are MoE ones, how many experts they have, and k."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        text: Any = config.text_config
        for layer in config.upcycled["layers"]:
            sizes = text.hidden_size, text.intermediate_size
            block = UpcycledMoEBlock(by_new_names(config.upcycled), *sizes)
            self.model.language_model.layers[layer].mlp = block

    @classmethod
    def from_dense(
        cls, dense: LlavaForConditionalGeneration, upcycled: dict[str, Any]
    ) -> UpcycledLlavaForConditionalGeneration:
        """Copies of the dense FFNs as experts, and fresh gates; all else is the dense model's."""
        config = LlavaConfig.from_dict(dense.config.to_dict() | {"upcycled": upcycled})
        with torch.device("meta"):
            model = cls(config)
        state = dense.state_dict()
        for layer in upcycled["layers"]:
            prefix = f"model.language_model.layers.{layer}.mlp."
            gate, up, down = (
                state.pop(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down")
            )
            copies = upcycled["num_experts"]
            both = torch.cat([gate, up])
            state[f"{prefix}experts.gate_up_proj"] = both.repeat(copies, 1, 1)
            state[f"{prefix}experts.down_proj"] = down.repeat(copies, 1, 1)
            state[f"{prefix}gate.weight"] = nn.Linear(gate.shape[1], copies, bias=False).weight.data
        model.load_state_dict(state, strict=True, assign=True)
        model.tie_weights()
        # buffers that are computed, not stored
        for (name, made), (_, kept) in zip(
            model.named_buffers(), dense.named_buffers(), strict=True
        ):
            if made.is_meta:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, kept)
        return model
