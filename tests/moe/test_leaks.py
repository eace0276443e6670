"""A training step leaves nothing behind, whatever the backbone and the router.

Counted are the memories that tensors have, whoever holds them. The garbage collector is off
meanwhile: it comes when Python has made enough objects, not when a GPU is full, and a cycle that
goes through the nodes of a graph, held from outside, it does not see at all.
"""

from __future__ import annotations

import gc
import itertools
import time
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemoe_ds.data.collate import Collator
from gemoe_ds.data.sample import open_samples
from gemoe_ds.engine.groups import expert_shard
from gemoe_ds.engine.world import distributed
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.models.tokenizer import load_tokenizer
from gemoe_ds.moe.router import Router
from tests.helpers import run_ranks
from tests.models.cases import CASES, write_case
from tests.routers.cases import TRAIN
from tests.tiny import make_model, random_batch, write_base
from tests.train.resuming import write_data


class Census(TorchDispatchMode):
    """Of all memories that came into being meanwhile, those that still are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                memory = StorageWeakRef(leaf.untyped_storage())
                self.seen[memory.cdata] = memory
        return result

    def alive(self) -> int:
        self.seen = {at: memory for at, memory in self.seen.items() if not memory.expired()}
        return len(self.seen)

    def settled(self, expected: int) -> int:
        """A thread of gloo may hold what it has sent for a moment."""
        deadline = time.monotonic() + 1
        while (alive := self.alive()) > expected and time.monotonic() < deadline:
            time.sleep(0.01)
        return alive


def alive_after_steps(model: MoEModel, batch: dict, steps: int) -> list[int]:
    model.train()
    counts: list[int] = []
    gc.disable()
    with Census() as census:
        for _ in range(steps):
            rolled_out = model(**batch, roll_out=True) if model.rollouts else None
            model(**batch, rolled_out=rolled_out)["loss"].backward()
            del rolled_out
            model.zero_grad()
            counts.append(census.settled(counts[-1]) if counts else census.alive())
    gc.enable()
    return counts


def count(
    rank: int, folder: Path, base: tuple[Path, Path], cases: list[tuple], steps: int
) -> dict[tuple, list[int]]:
    found = {}
    with distributed() as world:
        shards = {ep_size: expert_shard(ep_size, world) for ep_size in (1, 2)}
        for name, ep_size, recompute in cases:
            options = {"shard": shards[ep_size], "activation_checkpointing": recompute}
            if name in CASES:
                model, batch = of_backbone(name, folder / name, options)
            else:
                model, batch = of_router(name, base, options)
            found[name, ep_size, recompute] = alive_after_steps(model, batch, steps)
    return found


def of_router(name: str, base: tuple[Path, Path], options: dict) -> tuple[MoEModel, dict]:
    model = make_model(base, name, train=TRAIN.get(name, "routers"), **options)
    return model, random_batch(0)


def of_backbone(name: str, folder: Path, options: dict) -> tuple[MoEModel, dict]:
    backbone, gemoe = Backbone.named(name), Router.named("gemoe")
    router = (gemoe, gemoe.Config())
    model = MoEModel.from_checkpoint(
        backbone(backbone.Config()), folder / "base", folder / "tokenizer", router, **options
    )
    tokenizer = load_tokenizer(folder / "tokenizer", model.backbone.chat)
    collator = Collator(tokenizer, model.image_layout, model.backbone.chat, max_length=400)
    samples = open_samples(folder / "data")
    row = int(CASES[name].sees)  # the first sample has no image
    return model, collator.batch([collator.encode(row, samples[row])]).inputs


NAMES = [*Router.names(), *CASES]
ALL = list(itertools.product(NAMES, (1, 2), (False, True)))
SOME = [*itertools.product(NAMES, (2,), (True,)), ("gemoe", 1, True), ("gemoe", 2, False)]


@pytest.mark.parametrize(
    "cases, steps", [(SOME, 3), pytest.param(ALL, 5, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_no_memory_stays_alive_after_a_step(cases, steps, tmp_path):
    for name in CASES:
        write_case(name, tmp_path / name)
        write_data(tmp_path / name / "data", 2)
    for by_case in run_ranks(count, 2, tmp_path, write_base(tmp_path), cases, steps):
        assert list(by_case) == cases
        grown = {case: n for case, n in by_case.items() if max(n[2:]) > n[1]}
        assert not grown, grown
