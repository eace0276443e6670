"""What a MoE layer costs on so many ranks: products at a rate, messages, bytes over a link.

    t(layer) = fixed * tokens + FLOPs / rate + messages * alpha + bytes / beta

A token's row crosses to a rank once: the number of pairs is that of ranks that hold at least one of
its k experts. Experts are taken as evenly loaded, and nothing overlaps. benchmarks/cost_model.py
fits the numbers to measured rows; GPUS has them from data sheets.

Shapes: T tokens a rank, R ranks of an expert-parallel group, E experts, D model, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, lgamma

EXCHANGES = {
    "forward": 4,
    "frozen": 7,
    "trained": 7,
}  # counts, rows, metadata, home; and three gradients
IN_TURN = {"forward": 3, "frozen": 5}  # those that wait for another; rows and metadata go at once
TRIPS = {"forward": 1, "frozen": 2, "trained": 2}  # how often rows go there and back
PRODUCTS = {"forward": 1, "frozen": 2, "trained": 3}  # how often the experts' products are computed


@dataclass(frozen=True)
class Layer:
    """One MoE layer and how it is routed."""

    d_model: int
    width: int
    num_experts: int
    itemsize: int = 2

    def flops(self, tokens: int, mean_k: float) -> float:
        return 6.0 * self.d_model * self.width * tokens * mean_k

    def pairs(self, tokens: int, mean_k: float, ranks: int) -> float:
        """(token, remote rank) pairs of one rank: 1 - C(E - E/R, k) / C(E, k) a remote rank."""
        return tokens * (ranks - 1) * (1 - _none_of(self.num_experts, ranks, mean_k))

    def bytes(self, tokens: int, mean_k: float, ranks: int) -> float:
        """One rank's rows there and back, and eight bytes of metadata an assignment."""
        rows = 2 * self.pairs(tokens, mean_k, ranks) * self.d_model * self.itemsize
        return rows + 8 * tokens * mean_k * (ranks - 1) / ranks


def _none_of(num_experts: int, ranks: int, k: float) -> float:
    """Probability that a rank holds none of k experts chosen evenly; k may be a mean."""
    elsewhere = num_experts - num_experts / ranks
    if k > elsewhere:
        return 0.0
    log = lgamma(elsewhere + 1) - lgamma(elsewhere - k + 1)
    return exp(log - lgamma(num_experts + 1) + lgamma(num_experts - k + 1))


@dataclass(frozen=True)
class Machine:
    """Of one rank, or of one host whose ranks share everything."""

    fixed_s_per_token: float  # routing and what else does not depend on k
    flops_per_s: float
    alpha_s: float  # a message
    bytes_per_s: float
    shared: bool = False  # ranks share cores and links: work and bytes of all of them add up

    def seconds(self, layer: Layer, tokens: int, mean_k: float, ranks: int, mode: str) -> float:
        """One layer, forward or forward and backward with frozen experts."""
        sharing = ranks if self.shared else 1
        compute = (
            tokens * self.fixed_s_per_token * PRODUCTS[mode]
            + PRODUCTS[mode] * layer.flops(tokens, mean_k) / self.flops_per_s
        )
        if ranks == 1:
            return sharing * compute
        messages = EXCHANGES[mode] * (ranks - 1)
        moved = TRIPS[mode] * layer.bytes(tokens, mean_k, ranks)
        return sharing * (compute + moved / self.bytes_per_s) + messages * self.alpha_s


# An H100 SXM5 in a DGX, as NVIDIA's data sheets have it: bfloat16 without sparsity, NVLink and one
# 400 Gbit/s port of InfiniBand a GPU, a direction each. The shares of them that a run reaches, and
# the time of a message, are assumed.
PEAK, EFFICIENCY = 989e12, 0.45
NVLINK, INFINIBAND, LINK_EFFICIENCY = 450e9, 50e9, 0.75
ALPHA_NODE, ALPHA_NETWORK = 10e-6, 20e-6
_VECTOR_UNITS = 67e12  # float32, in which routers multiply


def h100(router_flops: float, *, inside_host: bool) -> Machine:
    """One GPU, whose expert-parallel group is inside a host or not; FLOPs of routing a token."""
    link = (NVLINK if inside_host else INFINIBAND) * LINK_EFFICIENCY
    alpha = ALPHA_NODE if inside_host else ALPHA_NETWORK
    return Machine(router_flops / (0.6 * _VECTOR_UNITS), PEAK * EFFICIENCY, alpha, link)
