"""One combination of the engine against plain single-process float32 PyTorch.

`python -m tests.engine.parity` (`make parity`) runs every combination on four gloo ranks and writes
results/parity.json; tests/engine/test_parity.py runs a part of them on two.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from gemoe_ds.analysis.provenance import provenance
from tests.helpers import repository, run_ranks
from tests.tiny import make_model, model_inputs, num_targets, random_batch, write_base

# Weights that would show a wrong scale; an eps that keeps Adam from turning the rounding of a
# gradient near zero into a step of full size.
GEMOE = {"monotonic_weight": 0.7, "balance_weight": 0.3}
LR, EPS, STEPS, CLIP = 1e-2, 1e-3, 3, 0.05

# float32 differs by the order of sums only.
FLOAT32_BOUND = 1e-5
# bfloat16: a layer has about 13 operations in a row; each rounds on the way to the loss, on the way
# back, and in the stored activation that the way back multiplies with: 40 roundings a stage, in 4
# stages (vision layer, projector, 2 layers of the language model), each a relative error of at most
# u = 2^-9; independent ones add up as their root. Four times that covers the tail and the rounding
# of the frozen weights. It holds for the norm of each tensor, for a smooth function: a token that
# goes to another expert, or a pair that crosses the hinge of GeMoE's loss, is a jump. So bf16 is
# measured with the top_k router, and with the experts that the reference has chosen (`replay`); how
# often it would choose others is another question (tests/engine/test_numbers.py).
# Weights get twice the bound: the second and third step start from weights that differ already.
BFLOAT16_BOUND = 4 * math.sqrt(40 * 4) * 2**-9  # 9.9 %


@dataclass(frozen=True)
class Case:
    zero: int
    offload: bool = False
    ep_size: int = 1
    train: str = "routers"
    accumulation: int = 1
    recompute: bool = False
    dtype: str = "float32"
    router: str = "gemoe"
    clip: float | None = CLIP
    distill: str | None = None  # which tokens
    gate_gradient: str = "chosen"
    compile: str = "none"

    @property
    def deepspeed(self) -> Path:
        """The shipped file; under ZeRO 3 one that really takes the parameters apart.

        By default it keeps those of up to 100,000 elements, which would be all of this model.
        """
        offload = "_offload" if self.offload else ""
        shipped = repository() / f"ds_configs/zero{self.zero}{offload}.json"
        if self.zero < 3:
            return shipped
        options = json.loads(shipped.read_text())
        options["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        file = Path(tempfile.gettempdir()) / f"gemoe_ds-{os.getpid()}-zero3{offload}.json"
        file.write_text(json.dumps(options))
        return file

    @property
    def bound(self) -> float:
        return FLOAT32_BOUND if self.dtype == "float32" else BFLOAT16_BOUND

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


ROUTER = {"float32": "gemoe", "bfloat16": "top_k"}


def all_cases() -> list[Case]:
    stages = [(0, False), *itertools.product((1, 2, 3), (False, True))]
    return [
        Case(zero, offload, ep_size, train, accumulation, recompute, dtype, ROUTER[dtype])
        for dtype, train, (zero, offload), ep_size, accumulation, recompute in itertools.product(
            ("float32", "bfloat16"), ("routers", "all"), stages, (1, 2, 4), (1, 2), (False, True)
        )
    ]


def micro_batches(count: int) -> list[dict]:
    """Ragged ones: other batch sizes, lengths and target counts; one has text only."""
    return [
        random_batch(20 + i, batch=1 + i % 3, length=12 + 2 * i, images=i != 1)
        for i in range(count)
    ]


def run_config(base, case: Case):
    from gemoe_ds.config.load import config_from_dict

    options = {"balance_weight": GEMOE["balance_weight"]}
    if case.router == "gemoe":
        options = GEMOE
    return config_from_dict(
        {
            "output_dir": "unused",
            "model": {
                "backbone": {"name": "tiny"},
                "checkpoint": str(base[0]),
                "router": {"name": case.router, **options},
                "trainable": case.train,
                "dtype": case.dtype,
                "activation_checkpointing": case.recompute,
                "gate_gradient": case.gate_gradient,
                "compile": case.compile,
            },
            "data": {"train_path": "unused", "tokenizer": str(base[1])},
            "optim": {"lr": LR, "eps": EPS, "schedule": "constant", "max_grad_norm": case.clip},
            "parallel": {"ep_size": case.ep_size},
            "train": {
                "steps": STEPS,
                "micro_batch_size": 1,
                "gradient_accumulation_steps": case.accumulation,
                "distill": case.distill and {"tokens": case.distill, "weight": 0.7},
            },
            "deepspeed": str(case.deepspeed),
        }
    )


def build(base, config, shard=None):
    model = make_model(
        base,
        config.model.router.name,
        config.model.router.config.model_dump(),
        shard,
        train=config.model.trainable,
        dtype=getattr(torch, config.model.dtype),
        activation_checkpointing=config.model.activation_checkpointing,
    )
    model.distill = config.train.distill
    for layer in model.moe_layers:
        layer.dense_gradient = config.model.gate_gradient == "dense"
    model.ctx.trace = True  # keeps k_T, for `chosen`
    return model.train()


def build_on_rank(base, case: Case, world):
    """The configuration of a case and this rank's model, to be handed to `initialize`."""
    from gemoe_ds.engine.groups import expert_shard

    config = run_config(base, case)
    shard = expert_shard(case.ep_size, world, trainable=case.train == "all")
    return config, build(base, config, shard)


def scales(model, batches: list[dict]) -> dict[str, float]:
    """What the sums of a micro-batch are divided by: all tokens of a step weigh the same."""
    found = {"targets_per_micro_batch": sum(map(num_targets, batches)) / len(batches)}
    if model.distill:
        positions = model.distill.positions
        number = sum(int(positions(b["labels_BS"], model_inputs(b)).sum()) for b in batches)
        found["distilled_per_micro_batch"] = number / len(batches)
    return found


def reference(base, case: Case, num_batches: int) -> dict:
    """Cross-entropy per target of the global batch, other losses per micro-batch, plain AdamW."""
    config = run_config(base, case)
    plain = {"dtype": "float32", "recompute": False}
    config = config.model_copy(update={"model": config.model.model_copy(update=plain)})
    model = build(base, config)
    batches = micro_batches(num_batches)
    params = model.trainable()
    optimizer = torch.optim.AdamW(params.values(), lr=LR, eps=EPS, weight_decay=0.0)
    divided_by = scales(model, batches)
    result: dict = {"norms": [], "losses": [], "masks": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = []
        for batch in batches:
            taught = model(**batch, teach=True) if case.distill else {}
            loss = model(**batch, **taught, **divided_by)["loss"] / num_batches
            loss.backward()
            losses.append(loss.item())
            result["masks"].append(chosen(model))
        if step == 0:
            result["grads"] = {n: p.grad.clone() for n, p in params.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(params.values(), case.clip or float("inf"))
        result["norms"].append(norm.item())
        result["losses"].append(sum(losses))
        optimizer.step()
    return result | {"weights": {n: p.detach() for n, p in params.items()}}


def chosen(model) -> torch.Tensor:
    """The experts of every token and layer in the last forward, bool [L, T, E]."""
    masks = []
    for record in model.ctx.layers:
        order_TE = record.logits_TE.argsort(-1, descending=True)
        ranks_TE = torch.arange(order_TE.shape[1]).expand_as(order_TE)
        is_chosen_TE = ranks_TE < record.k_T[:, None]
        masks.append(torch.zeros_like(is_chosen_TE).scatter(1, order_TE, is_chosen_TE))
    return torch.stack(masks)


def replay(model, masks: list[torch.Tensor]) -> None:
    """Make the routers take the experts of `masks`, one [L, T, E] a forward."""
    for slot, layer in enumerate(model.moe_layers):
        own = layer.router.select

        def select(logits_TE, x_TD, ctx, own=own, slot=slot):
            return replace(own(logits_TE, x_TD, ctx), mask_TE=masks[0][slot])

        layer.router.select = select


def errors(rank: int, base, case: Case, expected: dict, world) -> dict[str, float]:
    """The largest relative error of each kind on this rank, against the reference."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    from gemoe_ds.engine.build import MovedCheck, initialize
    from gemoe_ds.engine.world import gather_objects
    from gemoe_ds.engine.zero import full_value

    config, model = build_on_rank(base, case, world)
    engine = initialize(model, config, world)
    moved = MovedCheck(model, config.optim)
    sharded = model.sharded_parameters()
    params = model.trainable()
    batches = micro_batches(case.accumulation * world.size)
    divided_by = scales(model, batches)
    worst = {"loss": 0.0, "gradient": 0.0, "norm": 0.0, "weight": 0.0}
    current: list[torch.Tensor] = []
    if case.dtype == "bfloat16":
        replay(model, current)

    def compare(kind: str, name: str, have: torch.Tensor, want: torch.Tensor, floor: float) -> None:
        measure = torch.Tensor.norm if case.dtype == "bfloat16" else largest
        scale = max(measure(want).item(), floor)
        if name in sharded:
            want = want[model.shard.local(want.shape[0])]
        worst[kind] = max(worst[kind], measure(have.float() - want).item() / scale)

    for step in range(STEPS):
        total = 0.0
        for index in range(case.accumulation):
            number = index * world.size + rank
            batch = batches[number]
            current[:] = [expected["masks"][step * len(batches) + number]]
            taught = {}
            if case.distill:
                with torch.no_grad():
                    taught = engine(**batch, teach=True)
            loss = engine(**batch, **taught, **divided_by)["loss"]
            total += loss.item() / len(batches)
            engine.backward(loss)
            if step == 0 and index == case.accumulation - 1:
                # Some exact gradients are 0 (the bias of a key): what is left of them is rounding.
                floor = 1e-3 * expected["norms"][0]
                for name, grad in expected["grads"].items():
                    compare("gradient", name, safe_get_full_grad(params[name]), grad, floor)
            engine.step()
        loss, norm = sum(gather_objects(total)), float(engine.get_global_grad_norm())
        for kind, have, want in (
            ("loss", loss, expected["losses"][step]),
            ("norm", norm, expected["norms"][step]),
        ):
            if step == 0 or case.dtype == "float32":  # later bfloat16 steps start elsewhere
                worst[kind] = max(worst[kind], abs(have - want) / abs(want))
        if step == 0:
            moved.check()
    for name, weight in expected["weights"].items():
        compare("weight", name, full_value(params[name]), weight, floor=LR)
    engine.destroy()
    deepspeed.comm.barrier()
    return worst


def largest(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.abs().max()


def run_cases(rank: int, base, cases: list[Case], expected: dict) -> list[dict[str, float]]:
    from gemoe_ds.engine.world import distributed

    with distributed() as world:
        return [
            errors(rank, base, case, expected[reference_key(case, world.size)], world)
            for case in cases
        ]


def reference_key(case: Case, num_ranks: int) -> tuple:
    """Equal for cases that should come out the same."""
    num_batches = case.accumulation * num_ranks
    return (
        case.train,
        case.router,
        case.clip,
        case.dtype,
        case.distill,
        case.gate_gradient,
        num_batches,
    )


def references(base, cases: list[Case], num_ranks: int) -> dict:
    by_key = {reference_key(case, num_ranks): case for case in cases}
    return {key: reference(base, case, key[-1]) for key, case in by_key.items()}


def is_equal(case: Case, found: dict[str, float]) -> bool:
    slack = {"weight": 2.0} if case.dtype == "bfloat16" else {}
    return all(error <= slack.get(kind, 1.0) * case.bound for kind, error in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=repository() / "results/parity.json")
    parser.add_argument("--ranks", type=int, default=4)
    arguments = parser.parse_args()
    cases, began = all_cases(), time.time()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder))
        expected = references(base, cases, arguments.ranks)
        bar = tqdm(total=len(cases), unit="case")
        for first in range(0, len(cases), 24):  # new processes now and then: a hang stays small
            some = cases[first : first + 24]
            by_rank = run_ranks(run_cases, arguments.ranks, base, some, expected, timeout=600)
            for case, results in zip(some, zip(*by_rank, strict=True), strict=True):
                found = {kind: max(r[kind] for r in results) for kind in results[0]}
                rows.append(asdict(case) | {"errors": found, "equal": is_equal(case, found)})
            bar.update(len(some))
        bar.close()
    unequal = [row for row in rows if not row["equal"]]
    report = provenance() | {
        "command": "make parity",
        "seconds": round(time.time() - began, 1),
        "ranks": arguments.ranks,
        "bounds": {"float32": FLOAT32_BOUND, "bfloat16": BFLOAT16_BOUND},
        "cases": rows,
    }
    text = json.dumps(report, indent=None).replace('{"zero"', '\n {"zero"')
    arguments.out.write_text(text + "\n", encoding="utf-8")
    print(f"{len(rows) - len(unequal)} of {len(rows)} combinations equal the reference")
    for row in unequal:
        print("DIFFERS", row)


if __name__ == "__main__":
    main()
