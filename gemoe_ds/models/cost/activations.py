"""How much memory a training step needs beside weights, from shapes alone: of meta models too.

Sums what autograd keeps of transformers' decoder layers with frozen weights, and of our MoE layer:
see `_of_norm` and so on. Between the vision tower and the first router nothing is kept: nothing
there trains (unless everything does, `trainable: all`). tower_memory.py finds what images need.
Shapes: T tokens of a micro-batch, D model, F expert width, E experts, k experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.blocks import BlockSpec
from gemoe_ds.moe.experts import grouped
from gemoe_ds.moe.experts.ffn import path_for
from gemoe_ds.moe.experts.weights import product_dtype

WIDE = 4  # bytes of a float32, in which norms, routing and the loss are computed


@dataclass(frozen=True)
class StepShape:
    """The largest micro-batch of a rank, and how it is computed."""

    tokens: int
    targets: int
    itemsize: int  # of activations: 2 in bfloat16
    k: float  # experts a token
    ep_size: int = 1
    train: str = "routers"
    activation_checkpointing: bool = False
    on_gpu: bool = False
    images_at_most: int = 0  # bytes, before the language model or, if the tower trains, behind it
    distilled: int = 0  # positions, targets among them
    images_kept: int = 0  # bytes, while the language model runs
    quantised: bool = False  # experts in few bits: a CPU dequantises them one at a time

    @property
    def is_cast(self) -> bool:
        """Whether products are of narrower numbers than what trains, which is float32."""
        return self.itemsize < WIDE

    @property
    def without_checkpointing(self) -> StepShape:
        return replace(self, activation_checkpointing=False)

    def copies(self, products: int) -> int:
        """Of what several products read: each casts it for itself."""
        return products if self.is_cast else 1


def activation_bytes(
    backbone: Backbone, hf: nn.Module, blocks: list[BlockSpec], shape: StepShape
) -> dict[str, int]:
    """By what it is for; the sum is the peak of one micro-batch's forward and backward pass."""
    root = blocks[0].path.partition(".layers.")[0]
    text: Any = hf.get_submodule(root)
    prefix = len(f"{root}.layers.")
    of_layer = {block.path[prefix:].partition(".")[0]: block for block in blocks}
    d_model = blocks[0].routing.d_model
    kept, largest, seen = 0.0, 0.0, shape.train == "all"
    for number, layer in text.layers.named_children():
        block = of_layer.get(number)
        own = _of_layer(layer, shape) if seen else 0.0
        if block is not None:
            own += _of_block(block, shape)
            seen = True
        largest = max(largest, own)
        if shape.activation_checkpointing:
            own = d_model * shape.itemsize if seen else 0.0
        kept += own
    kept += WIDE * d_model + (largest if shape.activation_checkpointing else 0.0)
    vocabulary = sum(p.shape[0] for p in backbone.head(hf).parameters() if p.dim() == 2)
    # logits, their gradient, log-probabilities and theirs
    loss = shape.targets * vocabulary * (3 * WIDE + shape.itemsize)
    widest = max(_in_flight(block, shape) * shape.tokens + _casts(block, shape) for block in blocks)
    linear = [m for m in [*text.modules(), backbone.head(hf)] if isinstance(m, nn.Linear)]
    casts = sum(m.weight.numel() for m in linear) * shape.itemsize
    parts = {
        "weights cast for the products": casts if shape.train == "all" and shape.is_cast else 0,
        "activations": round(kept * shape.tokens),
        "loss or experts in flight": round(max(loss, widest)),
        "distillation": _of_teacher(shape, vocabulary, d_model),
    }
    # The tower has its widest moment while the language model holds nothing.
    images = max(shape.images_kept, shape.images_at_most - sum(parts.values()))
    return parts | {"images": images}


def _of_teacher(shape: StepShape, vocabulary: int, d_model: int) -> int:
    """What the loss has more: the teacher's hidden states and logits, the divergence's gradient,
    and logits where there is no target."""
    if not shape.distilled:
        return 0
    logits = 2 * shape.distilled + max(shape.distilled - shape.targets, 0)
    return (logits * vocabulary + shape.distilled * d_model) * shape.itemsize


def _of_layer(layer: nn.Module, shape: StepShape) -> float:
    """A token's bytes in all of a decoder layer but its MoE block."""
    total = 0.0
    module: Any
    for name, module in layer.named_modules():
        if ".experts" in name:
            continue
        width = _norm_width(name, module, layer)
        if width:
            total += width * _norm_bytes(module, shape)
        elif _has_linear(module, "q_proj", "k_proj", "v_proj"):
            query, key, value = (getattr(module, f"{n}_proj").out_features for n in "qkv")
            total += (2 * query + key + value) * shape.itemsize  # and the result
            if shape.train == "all":
                total += shape.copies(3) * module.q_proj.in_features * shape.itemsize
        elif _has_linear(module, "gate_proj", "up_proj", "down_proj"):
            inner = module.gate_proj.out_features
            total += 3 * inner * shape.itemsize  # gate, its activation, up
            if shape.train == "all":
                total += (inner + shape.copies(2) * module.gate_proj.in_features) * shape.itemsize
    return total


def _of_block(block: BlockSpec, shape: StepShape) -> float:
    """A token's bytes in an MoE block: its row here and where its experts are, the projections of
    each assignment with its ids and weight, and scores, their logarithms and their clamp."""
    routing, width = block.routing, block.down_EDF.shape[-1]
    rows = 1 + (_ranks_met(shape) if shape.ep_size > 1 else 0)
    total = rows * routing.d_model * shape.itemsize
    total += shape.k * (2 * width * experts_dtype(block, shape).itemsize + 3 * 8)
    return total + 3 * WIDE * routing.num_experts


def _in_flight(block: BlockSpec, shape: StepShape) -> float:
    """A token's bytes in the backward pass of an MoE block, given back at its end."""
    routing, width = block.routing, block.down_EDF.shape[-1]
    rows = 2 * WIDE * routing.d_model
    if not at_once(block, shape):
        return rows
    return rows + shape.k * (2 * routing.d_model + 4 * width) * shape.itemsize


def _casts(block: BlockSpec, shape: StepShape) -> int:
    """Of trainable experts of one block, in the narrower dtype of their products: themselves and
    their gradients; of quantised ones the larger matrix of an expert, unless a GPU's kernels
    dequantise them."""
    itemsize = experts_dtype(block, shape).itemsize
    if shape.quantised and not at_once(block, shape):
        return block.gate_up_EGD.numel() // block.routing.num_experts * itemsize
    if shape.train == "routers" or itemsize == WIDE:
        return 0
    experts = (block.gate_up_EGD.numel() + block.down_EDF.numel()) // shape.ep_size
    return 2 * experts * itemsize


def at_once(block: BlockSpec, shape: StepShape) -> bool:
    """Whether all experts are multiplied at once, or one after the other in small buffers."""
    if shape.quantised and not shape.on_gpu:
        return False
    dtype, width = experts_dtype(block, shape), block.down_EDF.shape[-1]
    return path_for(_device(shape), dtype, block.routing.d_model, width) is grouped


def experts_dtype(block: BlockSpec, shape: StepShape) -> torch.dtype:
    """Of the experts' products: float32 for bfloat16 on a CPU without instructions for it."""
    dtype = torch.bfloat16 if shape.is_cast else torch.float32
    return product_dtype(_device(shape), dtype, block.routing.d_model, block.down_EDF.shape[-1])


def _device(shape: StepShape) -> torch.device:
    return torch.device("cuda" if shape.on_gpu else "cpu")


def _ranks_met(shape: StepShape) -> float:
    """Ranks that a token's row goes to on average, if its experts were drawn evenly."""
    return shape.ep_size * (1 - (1 - 1 / shape.ep_size) ** shape.k)


def _norm_width(name: str, module: nn.Module, layer: nn.Module) -> int:
    """How many numbers a token's norm has, all heads together; 0 for anything else."""
    weight = getattr(module, "weight", None)
    if "norm" not in type(module).__name__.lower() or weight is None:
        return 0
    parent, _, own = name.rpartition(".")
    if own in ("q_norm", "k_norm"):
        projection = getattr(layer.get_submodule(parent), f"{own[0]}_proj")
        return int(projection.out_features)
    return int(weight.numel())


def _norm_bytes(module: nn.Module, shape: StepShape) -> int:
    """Of a number that a norm works on: itself, and normed if its weight trains."""
    all_trains = shape.train == "all"
    if isinstance(module, nn.LayerNorm):  # one kernel, which keeps what it was given
        return WIDE if all_trains else shape.itemsize
    return 2 * WIDE if all_trains else WIDE


def _has_linear(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in names)
