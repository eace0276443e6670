"""Routers in the variants that tests go through, and tokens for them."""

from __future__ import annotations

from dataclasses import replace

import torch

import gemoe_ds.routers  # noqa: F401  (registers every router)
from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.router import Router, RoutingSpec

# Every registered router takes part with its defaults; these are the variants beside them, and
# shorter schedules where a default is longer than a test.
VARIANTS: dict[str, dict[str, dict]] = {
    "gemoe": {
        "budget": {"budget_k": 2.5},
        "reversed": {"correlation": "negative"},
        "no_mono": {"monotonic_weight": 0.0},
        "soft_mask": {"ce_to_k": "soft_mask", "k_low": 0},
        "entropy": {"predictor_input": "entropy", "budget_k": 2.5},
        "both": {"predictor_input": "both", "detach_x": True},
    },
    "top_p": {
        "layer": {"learn": "layer", "start_k": 2.5},
        "token": {"learn": "token", "max_k": 3},
    },
    "adamoe": {
        "sum": {"norm_topk_prob": "sum", "k": 6},
        "all": {"norm_topk_prob": "all", "nulls": 9},
    },
    "moepp": {
        "sum": {"norm_topk_prob": "sum", "free_rows": "copies"},
        "no_residual": {"gating_residual": False},
    },
    "remoe": {"logits": {"activation": "logits", "target_k": 2.0}},
    "dynmoe": {
        "paper": {"start_k": "half", "adapt": "both", "adapt_every": 2},
        "scores": {"weights": "scores", "adapt": "close", "adapt_every": 2},
    },
    "ada_k": {
        "default": {"warm_steps": 2, "k_high": 6, "warm_mean_k": 3.0},
        "token": {"warm_steps": 0, "credit": "token", "updates": 3, "gamma": 0.9},
        "below": {"k_high": 2},  # the backbone's k, which the warm-up takes
    },
    "zeda": {"raw": {"norm_topk_prob": "raw", "zeros": 9, "zero_weight": 0.5}},
    "dtop_p": {"standardise": {"normalize": "standardise", "target_k": 2.5}},
    "ltdr": {"paper": {"norm_topk_prob": "sum", "mean_over": "batch", "k": 2, "tail_k": 6}},
    "ratio": {"half": {"ratio": 0.5}},
    "mass": {"most": {"share": 0.8}},
    "alloc_moe": {"fraction": {"k": 2.3}},
    "score": {
        "half": {"threshold": 0.15},
        "share": {"threshold": 0.25, "share": "yes", "k_low": 0},
    },
    "threshold": {
        "narrow": {"train_mean_k": (2.0, 2.0), "k_low": 0, "k_high": 6},
        "alike": {"importance": False},
    },
    "evolve": {"two_ranges": {"beta": ((0.0, 0.0), (0.5, 0.9))}},
    "evomoe": {"paper": {"k": 1, "gate": "none"}, "frozen": {"gate": "frozen"}},
}


# What trains, where it is not the routers alone.
TRAIN = {"evolve": "experts"}


def all_variants() -> list[tuple[str, dict]]:
    cases = []
    for name in Router.names():
        variants = {"default": {}} | VARIANTS.get(name, {})
        cases += [(name, options) for options in variants.values()]
    return cases


def case_id(case: tuple[str, dict]) -> str:
    return "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())])


SPEC = RoutingSpec(d_model=16, num_experts=8, top_k=4, norm_topk_prob=False)


def make_router(name: str, options: dict, spec: RoutingSpec = SPEC, seed: int = 0) -> Router:
    torch.manual_seed(seed)
    chosen = Router.named(name)
    router = chosen(chosen.Config(**options), spec)
    router.adopt_gate(torch.randn(spec.num_experts, spec.d_model) * 0.3)
    return router


def make_context(
    valid: torch.Tensor, vision: torch.Tensor | None = None, layers: int = 1
) -> TokenContext:
    """Of bool tensors [B, S]."""
    ctx = TokenContext(layers)
    ctx.begin(valid, torch.zeros_like(valid) if vision is None else vision)
    return ctx


def ragged_tokens(seed: int, spec: RoutingSpec = SPEC, sequences: int = 3, length: int = 9):
    """x_TD and a context in which a part is padding and a part vision."""
    g = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(sequences * length, spec.d_model, generator=g)
    lengths = torch.randint(0, length + 1, (sequences, 1), generator=g)
    valid = torch.arange(length) < lengths
    vision = (torch.arange(length) < 4).expand_as(valid) & valid
    vision = vision & (torch.arange(sequences)[:, None] > 0)  # the first sequence is text
    return x_TD, make_context(valid, vision)


def at_slot(spec: RoutingSpec, slot: int) -> RoutingSpec:
    return replace(spec, slot=slot)
