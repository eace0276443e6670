"""What the paper's tables say of its two backbones, and how their column "N" follows from k.

GeMoE (arXiv 2606.26287), Tables 1 and 2; shapes of experts from the models' own configurations.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemoe_ds.errors import ConfigError


@dataclass(frozen=True)
class Published:
    """A backbone as the paper counts it: parameters that a token uses at the backbone's own k."""

    activated: float  # the paper's N at top_k
    top_k: int
    num_layers: int  # MoE layers
    d_model: int
    width: int  # of one expert

    @property
    def params_per_expert(self) -> int:
        """One expert in every MoE layer: gate, up and down projection."""
        return 3 * self.d_model * self.width * self.num_layers


PUBLISHED = {
    "molmoe": Published(1.58e9, 8, 16, 2048, 1024),
    "deepseek_vl2_tiny": Published(1.17e9, 6, 11, 1280, 896),
}


def activated_parameters(backbone: str, mean_k: float) -> float:
    """The paper's N: what a token uses when it visits `mean_k` real experts a layer on average.

    Free experts (zero, copy, constant) and shared ones do not count in `mean_k`. From the paper's
    own N at top-k, which is rounded to 10 million, so the result is good to that.
    """
    if backbone not in PUBLISHED:
        known = ", ".join(PUBLISHED)
        raise ConfigError(f"backbone {backbone!r} is not in the paper's tables; there are: {known}")
    found = PUBLISHED[backbone]
    return found.activated - (found.top_k - mean_k) * found.params_per_expert
