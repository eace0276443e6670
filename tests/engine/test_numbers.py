"""Numbers that mean what they say: coefficients, padding, precision of routing."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gemoe_ds.moe.context import LossTerm
from tests.engine.parity import Case, build_on_rank
from tests.helpers import run_ranks
from tests.tiny import SHAPE, make_model, num_targets, random_batch

COEFFICIENT, SLOPE = 0.375, 3.0


def with_known_gradient(model) -> None:
    """A loss whose gradient needs no measuring: SLOPE * sum of the predictor's weights, alone.

    By Eq. 13 it is averaged over layers: each predictor's gradient is COEFFICIENT * SLOPE / L.
    """
    for layer in model.moe_layers:
        router = layer.router

        def losses(decision, logits_TE, ctx, router=router):
            return {"known": LossTerm(SLOPE * router.eap.weight.sum(), COEFFICIENT)}

        router.losses = losses


def known_gradients(rank: int, base, cases: list[Case], sizes: list[int]) -> list[float]:
    """The largest deviation from the closed form in every case."""
    from deepspeed.utils import safe_get_full_grad

    from gemoe_ds.engine.build import initialize
    from gemoe_ds.engine.world import distributed

    worst = []
    with distributed() as world:
        for case, size in zip(cases, sizes, strict=True):
            config, model = build_on_rank(base, case, world)
            engine = initialize(model, config, world)
            with_known_gradient(model)
            for index in range(case.accumulation):
                # ranks and micro-batches of unequal size: none may weigh more than another
                batch = random_batch(rank + 2 * index, batch=size + rank, length=10 + 4 * index)
                engine.backward(engine(**batch)["loss"])
                if index < case.accumulation - 1:
                    engine.step()
            expected = COEFFICIENT * SLOPE / SHAPE["num_layers"]
            grads = [safe_get_full_grad(layer.router.eap.weight) for layer in model.moe_layers]
            worst.append(max((grad - expected).abs().max().item() for grad in grads))
            engine.step()
            engine.destroy()
    return worst


COEFFICIENT_CASES = [
    (Case(zero, ep_size=ep_size, accumulation=accumulation, recompute=recompute), size)
    for (zero, ep_size), (accumulation, recompute), size in itertools.product(
        ((0, 1), (2, 2), (3, 2)), ((1, False), (3, False), (2, True)), (1, 3)
    )
]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_coefficients_do_not_depend_on_how_a_step_is_split(base, num_ranks):
    chosen = [(c, s) for c, s in COEFFICIENT_CASES if c.ep_size <= num_ranks]
    cases, sizes = zip(*chosen, strict=True)
    for worst in run_ranks(known_gradients, num_ranks, base, list(cases), list(sizes)):
        assert max(worst) < 1e-6, dict(zip(map(str, chosen), worst, strict=True))


def loss_and_gradients(model, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    parts = model(**batch, targets_per_micro_batch=float(num_targets(batch)))
    parts["loss"].backward()
    params = model.trainable().items()
    return parts["loss"].detach(), {n: p.grad.clone() for n, p in params if p.grad is not None}


def padded(batch: dict, columns: int, rows: int) -> dict:
    """The same samples in a larger batch: more columns, and sequences of nothing but padding."""
    count, length = batch["input_ids_BS"].shape
    fill = {"input_ids_BS": 0, "labels_BS": -100, "is_valid_BS": False, "is_vision_BS": False}
    grown = {}
    for name, value in fill.items():
        grown[name] = torch.full((count + rows, length + columns), value)
        grown[name][:count, :length] = batch[name]
    feature_BS = torch.full((count + rows, length + columns), -1)
    feature_BS[:count, :length] = batch["images"]["feature_BS"]
    images = batch["images"] | {"feature_BS": feature_BS}
    return batch | {n: t.to(batch[n].dtype) for n, t in grown.items()} | {"images": images}


@settings(max_examples=15, deadline=None)
@example(seed=268, columns=2, rows=0, router="gemoe", train="all")  # 2e-5 in the tower
@given(
    seed=st.integers(0, 1000),
    columns=st.integers(0, 9),
    rows=st.integers(0, 3),
    router=st.sampled_from(["gemoe", "top_k"]),
    train=st.sampled_from(["routers", "all"]),
)
def test_padding_changes_no_loss_and_no_gradient(base, seed, columns, rows, router, train):
    batch = random_batch(seed, batch=2)
    model = make_model(base, router, {"balance_weight": 0.5}, train=train).train()
    loss, grads = loss_and_gradients(model, batch)
    larger, again = loss_and_gradients(model, padded(batch, columns, rows))
    torch.testing.assert_close(larger, loss, rtol=1e-6, atol=0)
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm().item()
    for name, grad in grads.items():
        scale = max(grad.abs().max().item(), 1e-3 * norm)
        bound = 5e-5 if "vision_tower" in name else 1e-5  # the tower's small gradients round more
        torch.testing.assert_close(again[name], grad, rtol=bound, atol=bound * scale, msg=name)
