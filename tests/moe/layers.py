"""Small MoE layers and tokens for them."""

import torch

import gemoe_ds.routers  # noqa: F401  (registers every router)
from gemoe_ds.moe.layer import MoELayer

SIZES = {"d_model": 16, "d_ff": 8, "num_experts": 8, "top_k": 4}


def build(router="gemoe", seed=0, **options) -> MoELayer:
    torch.manual_seed(seed)
    return MoELayer.build(**SIZES, router=router, **options)


def tokens(*shape, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 16, generator=g).requires_grad_()
