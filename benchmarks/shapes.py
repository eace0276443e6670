"""The MoE layers of the backbones, by their published shapes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One MoE layer of a backbone, its shared experts left out."""

    name: str
    d_model: int  # D
    width: int  # F of each routed expert
    num_experts: int  # E
    top_k: int  # the backbone's own k

    def forward_flops(self, num_assignments: int) -> int:
        """Of the three products of every assignment."""
        return 2 * 3 * self.d_model * self.width * num_assignments


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("olmoe", 2048, 1024, 64, 8),  # OLMoE-1B-7B and MolmoE-1B
        Shape("deepseek_vl2_tiny", 1280, 896, 64, 6),
        Shape("qwen3_vl_30b", 2048, 768, 128, 8),
        Shape("demo", 64, 16, 64, 8),
    )
}
