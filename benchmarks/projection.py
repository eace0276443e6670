"""The cost model carried to GPU clusters: training steps of full backbones on 8 to 4096 GPUs.

NOT measured: an estimate from data sheets, made to see which term grows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import log2
from pathlib import Path
from typing import Any

from benchmarks.cost_model import compare, fit, of_ours
from benchmarks.rows import Row
from benchmarks.shapes import Shape
from gemoe_ds.models.cost.layer_time import (
    ALPHA_NETWORK,
    EFFICIENCY,
    INFINIBAND,
    LINK_EFFICIENCY,
    NVLINK,
    PEAK,
    Layer,
    h100,
)

ASSUMPTIONS = """\
Sources, all NVIDIA's: H100 SXM5 data sheet (989 TFLOP/s bf16 without sparsity, NVLink 450 GB/s a
direction); DGX H100 user guide and ConnectX-7 data sheet (one 400 Gbit/s NDR InfiniBand port a GPU,
50 GB/s a direction). Assumed: 45 % of the peak in the products, 75 % of a link's rate in the
exchanges, 10 us a message inside a node and 20 us between nodes, 16,384 tokens a GPU and
micro-batch, evenly loaded experts, frozen (their backward pass multiplies as often as the forward
pass), no overlap, routers and predictors averaged over all GPUs by a ring, EP 64 wholly over
InfiniBand. GeMoE keeps 63.5 % of the experts (its paper). Output head, vision tower and optimizer
are left out."""

TOKENS, SEQUENCE, GPUS_A_NODE = 16384, 2048, 8
KEPT = 1 - 0.365  # of the experts, with GeMoE (the paper's abstract)
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Backbone:
    """A language model by what a token multiplies; from the published configurations."""

    name: str
    num_layers: int
    num_moe_layers: int
    layer: Layer
    top_k: int
    dense_parameters: int  # a layer: attention projections and shared experts

    def dense_flops(self) -> float:
        """Forward, a token and layer: dense weights and causal attention scores."""
        return 2.0 * self.dense_parameters + 2.0 * SEQUENCE * self.layer.d_model


BACKBONES = (
    Backbone("OLMoE / MolmoE-1B", 16, 16, Layer(2048, 1024, 64), 8, 4 * 2048**2),
    Backbone(
        "DeepSeek-VL2-Tiny", 12, 11, Layer(1280, 896, 64), 6, 4 * 1280**2 + 2 * 3 * 1280 * 896
    ),
    Backbone(
        "Qwen3-VL-30B-A3B", 48, 48, Layer(2048, 768, 128), 8, 2 * 2048 * 4096 + 2 * 2048 * 512
    ),
)


def step_seconds(backbone: Backbone, gpus: int, ep_size: int, mean_k: float) -> float:
    """Forward and backward pass of one micro-batch, and the routers' all-reduce."""
    inside = ep_size <= GPUS_A_NODE
    rate = PEAK * EFFICIENCY
    layer = backbone.layer
    router_flops = 2.0 * layer.d_model * (layer.num_experts + backbone.top_k)
    machine = h100(router_flops, inside_host=inside)
    moe = machine.seconds(layer, TOKENS, mean_k, ep_size, "frozen")
    dense = 2 * TOKENS * backbone.dense_flops() / rate
    gradients = 4.0 * backbone.num_moe_layers * layer.d_model * (layer.num_experts + backbone.top_k)
    network = (INFINIBAND if gpus > GPUS_A_NODE else NVLINK) * LINK_EFFICIENCY
    average = 2 * gradients / network + 2 * log2(gpus) * ALPHA_NETWORK
    return backbone.num_moe_layers * moe + backbone.num_layers * dense + average


def project() -> list[dict[str, Any]]:
    """Every backbone with all experts and with GeMoE's share of them; EP in and across nodes."""
    rows = []
    for backbone in BACKBONES:
        for ep_size in (8, 64):
            for gpus in (n for n in GPUS if n >= ep_size):
                full = step_seconds(backbone, gpus, ep_size, backbone.top_k)
                kept = step_seconds(backbone, gpus, ep_size, KEPT * backbone.top_k)
                rows.append(
                    {
                        "backbone": backbone.name,
                        "ep": ep_size,
                        "gpus": gpus,
                        "all_experts_ms": round(1e3 * full, 2),
                        "gemoe_ms": round(1e3 * kept, 2),
                        "speed_up": round(full / kept, 3),
                        "tokens_per_s": round(gpus * TOKENS / kept),
                    }
                )
    return rows


def cost_section(rows: list[Row], shape: Shape, out: Path) -> dict[str, Any] | None:
    """The cost model fitted on these rows; None if they have no EP 1 and EP 2."""
    if not (of_ours(rows, "layer", 1) and of_ours(rows, "ep", 2)):
        return None
    layer = Layer(shape.d_model, shape.width, shape.num_experts)
    machine = fit(rows, layer)
    return {
        "machine": asdict(machine),
        "compared": compare(machine, rows, layer),
        "projected": project(),
        "assumptions": ASSUMPTIONS,
        "figure": f"{out.stem}_cost.png",
    }
