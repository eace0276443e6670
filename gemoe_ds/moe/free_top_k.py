"""Routers with free experts among which a token chooses as among the others, k in all.

Shapes: T tokens, N = E + M columns: E routed experts, M free ones.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.experts.zero_computation import ZeroComputationKind
from gemoe_ds.moe.router import Decision, Router, RoutingSpec
from gemoe_ds.moe.selection import fixed_k, top_k_mask
from gemoe_ds.registry import ConfigModel


class FreeTopK(Router):
    """The k best of all columns, by softmax scores: a token uses 0 to k routed experts."""

    def __init__(
        self,
        config: ConfigModel,
        spec: RoutingSpec,
        free: Sequence[ZeroComputationKind],
        k: int | None,
    ) -> None:
        """`k`: free experts included; None: the backbone's."""
        super().__init__(config, spec, free)
        self.k = fixed_k(k, spec, len(free))

    def select(self, logits_TE: Tensor, x_TD: Tensor, ctx: TokenContext) -> Decision:
        scores_TN = logits_TE.softmax(-1)
        mask_TN = top_k_mask(scores_TN, self.k)
        return Decision(scores_TN, mask_TN, self.weigh(scores_TN, mask_TN))

    @abstractmethod
    def weigh(self, scores_TN: Tensor, mask_TN: Tensor) -> Tensor:
        """The combine weights, [T, N]."""

    @property
    def max_k(self) -> int:
        return min(self.k, self.spec.num_experts)
