"""Every rank issues the same collectives in the same order, whatever was routed.

Recorded below everything, at the dispatcher of torch: (op, group, numel) of each. An all-to-all of
rows has the sizes that the routing gives it, so of those only op and group are compared.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.parity import Case, build_on_rank
from tests.helpers import run_ranks
from tests.tiny import random_batch, write_base

CASES = [
    Case(0, ep_size=2),
    Case(1, ep_size=2, train="all"),
    Case(2, ep_size=2, recompute=True),
    Case(3, ep_size=2, accumulation=2),
    Case(3, ep_size=2, train="all"),
    Case(3, ep_size=1, train="all", offload=True),
]


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function.name()
            boxed = next(a for a in args if isinstance(a, torch.ScriptObject))
            ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(boxed))
            # Sibling groups, such as those of equal expert shards, count as one.
            group = tuple(rank - ranks[0] for rank in ranks)
            sizes = () if "alltoall" in name else tuple(numels(args))
            self.calls.append((name, group, sizes))
        return function(*args, **(kwargs or {}))


def numels(value):
    if isinstance(value, torch.Tensor):
        yield value.numel()
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from numels(item)


def everything_to_one(mask_TE, rank):
    return torch.zeros_like(mask_TE).index_fill(1, torch.tensor([3]), True)


def idle_on_this_rank(mask_TE, rank):
    return mask_TE.index_fill(1, torch.tensor([1]), False) if rank == 1 else mask_TE


def idle_everywhere(mask_TE, rank):
    return mask_TE.index_fill(1, torch.arange(4), False)  # all that rank 0 holds


def nothing_on_a_rank(mask_TE, rank):
    return torch.zeros_like(mask_TE) if rank == 1 else mask_TE


def nothing(mask_TE, rank):
    return torch.zeros_like(mask_TE)


def as_routed(mask_TE, rank):
    return mask_TE


ROUTINGS = [
    as_routed,
    everything_to_one,
    idle_on_this_rank,
    idle_everywhere,
    nothing_on_a_rank,
    nothing,
]


def script(model, routing, rank: int) -> None:
    """Replace what the routers choose, and nothing else."""
    for layer in model.moe_layers:
        own = type(layer.router).select.__get__(layer.router)

        def select(logits_TE, x_TD, ctx, own=own):
            decision = own(logits_TE, x_TD, ctx)
            return replace(decision, mask_TE=routing(decision.mask_TE, rank))

        layer.router.select = select


def batches_of(rank: int) -> list[dict]:
    """Rank 1: text only, a shorter and smaller last batch, one with a single sequence."""
    if rank == 0:
        return [random_batch(i, batch=3, length=16) for i in range(3)]
    return [
        random_batch(10, batch=3, length=16, images=False),
        random_batch(11, batch=1, length=9),
        random_batch(12, batch=2, length=30),
    ]


def record(rank: int, base, cases: list[Case]) -> list[list[tuple]]:
    from gemoe_ds.engine.build import initialize
    from gemoe_ds.engine.world import distributed

    sequences = []
    with distributed() as world:
        for case in cases:
            config, model = build_on_rank(base, case, world)
            engine = initialize(model, config, world)
            recorder = Recorder()
            with recorder:
                for routing in ROUTINGS:
                    script(model, routing, rank)
                    for batch in batches_of(rank):
                        for _ in range(case.accumulation):
                            loss = engine(**batch)["loss"]
                            assert torch.isfinite(loss)
                            engine.backward(loss)
                            engine.step()
            assert all(p.isfinite().all() for p in model.trainable().values())
            sequences.append(recorder.calls)
            engine.destroy()
    return sequences


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    base = write_base(tmp_path_factory.mktemp("base"))
    return run_ranks(record, 2, base, CASES, timeout=240)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_all_ranks_issue_the_same_collectives(recorded, index):
    first, second = (sequences[index] for sequences in recorded)
    assert first == second
    kinds = {name for name, _, _ in first}
    assert any("alltoall" in name for name in kinds) == (CASES[index].ep_size > 1), kinds
    assert len(first) > len(ROUTINGS) * 3, "there is something to compare"


def test_the_recorder_sees_what_differs(recorded):
    """Group and size are recorded: two stages differ in them."""
    sizes = [{sizes for _, _, sizes in sequences} for sequences in recorded[0]]
    assert sizes[0] != sizes[3]
    assert {group for _, group, _ in recorded[0][1]} == {(0,), (0, 1)}
