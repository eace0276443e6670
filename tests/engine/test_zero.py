"""What engine/zero.py knows of DeepSpeed's insides, stage by stage; and the guards built on it.

A new DeepSpeed that keeps its master copies elsewhere fails here.
"""

from __future__ import annotations

import pytest
import torch

from tests.engine.parity import Case, build_on_rank, micro_batches
from tests.helpers import run_ranks
from tests.tiny import write_base

CASES = [
    Case(0),
    Case(1, ep_size=2, train="all"),
    Case(2),
    Case(2, offload=True),
    Case(3, ep_size=2, train="all"),
    Case(3, offload=True),
]


def probe(rank: int, base, cases: list[Case]) -> None:
    from gemoe_ds.engine.build import MovedCheck, check_optimizer_holds, initialize
    from gemoe_ds.engine.world import distributed
    from gemoe_ds.engine.zero import MOMENTS, assign_, full_moment, full_value, set_moments

    batches = micro_batches(2)
    with distributed() as world:
        for case in cases:
            config, model = build_on_rank(base, case, world)
            model.odd = torch.nn.Parameter(torch.arange(7.0))  # two ranks do not divide it
            engine = initialize(model, config, world)
            with pytest.raises(RuntimeError, match="no parameter of group 'router' has moved"):
                MovedCheck(model, config.optim).check()
            params = model.trainable()

            # of a shard of the experts nobody else has a part: that is what estimate.py counts
            if case.zero == 3:
                alone = model.sharded_parameters() if case.train != "routers" else {}
                for name, p in model.named_parameters():
                    parts = 1 if any(p is expert for expert in alone.values()) else 2
                    assert p.ds_tensor.ds_numel == -(-p.ds_numel // parts), (case, name)

            # moments that are set are the moments that are read, whole and in place
            g = torch.Generator().manual_seed(0)
            shapes = {n: full_value(p).shape for n, p in params.items()}
            values = {
                (n, m): torch.rand(shape, generator=g)
                for n, shape in shapes.items()
                for m in MOMENTS
            }
            set_moments(engine, ((params[n], m, v) for (n, m), v in values.items()), 5)
            for (name, moment), value in values.items():
                have = full_moment(engine, params[name], moment)
                assert torch.equal(have.reshape(value.shape).cpu(), value), (case, name, moment)

            # an assigned value is what the next forward uses, and outlives the next step
            gate = model.moe_layers[0].router.gate.weight
            assert (gate.numel() == 0) == (case.zero == 3), "really taken apart"
            value = torch.full_like(full_value(gate), 0.25)
            assign_(gate, value)
            assert torch.equal(full_value(gate), value)
            with torch.no_grad():
                engine(**batches[rank])
                uniform = model.ctx.layers[0].logits_TE
                assert (uniform - uniform[:, :1]).abs().max() < 1e-5, "equal rows, equal logits"
            set_moments(
                engine,
                ((params[n], m, torch.zeros(s)) for n, s in shapes.items() for m in MOMENTS),
                1,
            )
            for group in engine.optimizer.param_groups:
                group["lr"] = 0.0
            engine.backward(engine(**batches[rank])["loss"])
            engine.step()
            assert torch.equal(full_value(gate), value), (case, "the master has not overwritten it")

            model.lost = torch.nn.Parameter(torch.ones(3))
            with pytest.raises(RuntimeError, match="does not hold 1 trainable parameters: .*lost"):
                check_optimizer_holds(engine, model)
            engine.destroy()


def test_masters_moments_and_guards_at_every_stage(tmp_path):
    run_ranks(probe, 2, write_base(tmp_path), CASES, timeout=200)
