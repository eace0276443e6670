"""Gradients and steps under DeepSpeed equal a plain single-process float32 reference."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import repository, run_ranks
from tests.tiny import make_model, num_targets, random_batch, write_base

GEMOE = {"monotonic_weight": 0.7, "balance_weight": 0.3}  # weights that would show a wrong scale
LR = 1e-2


def micro_batches(count: int) -> list[dict]:
    """Ragged ones: other batch sizes, lengths and target counts; one has text only."""
    return [
        random_batch(20 + i, batch=1 + i % 3, length=12 + 2 * i, images=i != 1)
        for i in range(count)
    ]


def run_config(base, router: str, zero: int, ep_size: int, accumulation: int, clip: float | None):
    from gemoe_ds.config.load import config_from_dict

    options = GEMOE if router == "gemoe" else {"balance_weight": GEMOE["balance_weight"]}
    return config_from_dict(
        {
            "output_dir": "unused",
            "model": {
                "backbone": {"name": "tiny"},
                "checkpoint": str(base[0]),
                "router": {"name": router, **options},
                "dtype": "float32",
            },
            "data": {"train": "unused", "tokenizer": str(base[1])},
            "optim": {"lr": LR, "schedule": "constant", "clip_norm": clip},
            "parallel": {"ep_size": ep_size},
            "train": {"steps": 3, "micro_batch": 1, "accumulation": accumulation},
            "deepspeed": str(repository() / f"ds_configs/zero{zero}.json"),
        }
    )


def reference(base, config, batches: list[dict], steps: int):
    """Plain PyTorch: cross-entropy per target of the global batch, other losses per micro-batch."""
    model = make_model(base, config.model.router.name, config.model.router.config.model_dump())
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=LR, weight_decay=0.0)
    total_targets = sum(map(num_targets, batches))
    grads, norms = {}, []
    for step in range(steps):
        optimizer.zero_grad()
        for batch in batches:
            parts = model(**batch, targets_per_micro_batch=total_targets / len(batches))
            (parts["loss"] / len(batches)).backward()
        if step == 0:
            grads = {n: p.grad.clone() for n, p in model.trainable().items()}
        norms.append(
            torch.nn.utils.clip_grad_norm_(
                model.trainable().values(), config.optim.clip_norm or float("inf")
            ).item()
        )
        optimizer.step()
    return grads, norms, {n: p.detach() for n, p in model.trainable().items()}


def train_on_rank(rank: int, base, cases: list):
    from deepspeed.utils import safe_get_full_grad

    from gemoe_ds.engine.build import MovedCheck, initialize
    from gemoe_ds.engine.distributed import distributed
    from gemoe_ds.engine.groups import expert_shard

    results = []
    with distributed() as world:
        for router, zero, ep_size, accumulation, clip in cases:
            config = run_config(base, router, zero, ep_size, accumulation, clip)
            model = make_model(
                base, router, config.model.router.config.model_dump(), expert_shard(ep_size, world)
            )
            engine = initialize(model, config, world)
            moved = MovedCheck(model, config.optim)
            batches = micro_batches(accumulation * world.size)
            total = sum(map(num_targets, batches))
            grads, norms = {}, []
            for step in range(3):
                for index in range(accumulation):
                    batch = batches[index * world.size + rank]
                    parts = engine(**batch, targets_per_micro_batch=total / len(batches))
                    engine.backward(parts["loss"])
                    if step == 0 and index == accumulation - 1:
                        grads = {n: safe_get_full_grad(p) for n, p in model.trainable().items()}
                    engine.step()
                norms.append(float(engine.get_global_grad_norm()))
                if step == 0:
                    moved.check()
            weights = {n: p.detach().clone() for n, p in model.trainable().items()}
            results.append((grads, norms, weights))
        _guards_hold(engine, model, config)
    return results


def _guards_hold(engine, model, config) -> None:
    """What must stop a run does; and an assigned value outlives the optimizer's next step."""
    from deepspeed.utils import safe_get_full_fp32_param

    from gemoe_ds.engine.assign import assign_
    from gemoe_ds.engine.build import MovedCheck, check_optimizer_holds

    with pytest.raises(RuntimeError, match="no parameter of group 'router' has moved"):
        MovedCheck(model, config.optim).check()
    gate = model.moe_layers[0].router.gate.weight
    value = torch.full_like(gate, 0.25)
    assign_(gate, value)
    assert torch.equal(safe_get_full_fp32_param(gate), value)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    for index in range(config.train.accumulation):
        engine.backward(engine(**micro_batches(2)[index])["loss"])
        engine.step()
    assert torch.equal(gate, value), "the master copy has not overwritten it"
    model.lost = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="does not hold 1 trainable parameters: .*lost"):
        check_optimizer_holds(model)


CASES = [  # router, ZeRO stage, EP size, accumulation, clip norm
    ("gemoe", 1, 2, 1, None),
    ("gemoe", 2, 2, 1, 0.01),
    ("gemoe", 1, 2, 2, 0.01),
    ("gemoe", 2, 2, 2, None),
    ("gemoe", 2, 1, 2, None),
    ("top_k", 2, 2, 2, 1.0),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


def test_two_ranks_equal_the_reference(base):
    """Every trainable gradient, the norm before clipping, and the weights after three steps."""
    by_rank = run_ranks(train_on_rank, 2, base, CASES, timeout=240)
    for case, results in zip(CASES, zip(*by_rank, strict=True), strict=True):
        router, zero, ep, accumulation, clip = case
        config = run_config(base, router, zero, ep, accumulation, clip)
        grads, norms, weights = reference(base, config, micro_batches(2 * accumulation), 3)
        for have_grads, have_norms, have_weights in results:
            assert have_grads.keys() == grads.keys()
            for name, grad in grads.items():
                scale = grad.abs().max().item()
                torch.testing.assert_close(
                    have_grads[name], grad, rtol=1e-5, atol=1e-5 * scale, msg=f"{case} {name}"
                )
            torch.testing.assert_close(
                torch.tensor(have_norms), torch.tensor(norms), rtol=1e-5, atol=0, msg=f"{case}"
            )
            for name, weight in weights.items():
                # Adam divides by the gradient's size: where that is all rounding, so is the step
                torch.testing.assert_close(have_weights[name], weight, rtol=1e-4, atol=1e-4)
