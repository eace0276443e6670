"""A NaN or Inf anywhere skips the step on all ranks alike, at every stage."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.parity import Case, build_on_rank
from tests.helpers import run_ranks
from tests.tiny import random_batch, write_base
from tests.train.resuming import make_config, train_all, write_setting

CASES = [
    Case(0, ep_size=2, train="all"),
    Case(1, ep_size=2),
    Case(2, ep_size=2, train="all", accumulation=2),
    Case(3, ep_size=2, train="all"),
    Case(3, offload=True),
]
NAN, INF = float("nan"), float("inf")


def harms(model, case: Case):
    """What spoils one step of one rank, each in one place only; called with the batch."""

    def in_batch(batch):
        batch["images"]["pixels"][0, 0, 0, 0] = NAN

    def in_logits(batch):
        router = model.moe_layers[1].router

        def poison(x_TD, ctx):
            del router.score  # this one, which hides the class's
            return router.score(x_TD, ctx).index_fill(0, torch.tensor([2]), INF)

        router.score = poison

    def in_one_expert(batch):
        def poison(grad_EGD):
            hook.remove()
            return grad_EGD.index_fill(0, torch.tensor([1]), NAN)

        hook = model.moe_layers[0].experts.down_EDF.register_hook(poison)

    found = [in_batch, in_logits]
    return found + ([in_one_expert] if case.train == "all" else [])


def probe(rank: int, base, cases: list[Case]) -> list[list[str]]:
    from gemoe_ds.engine.build import initialize
    from gemoe_ds.engine.world import distributed
    from gemoe_ds.engine.zero import MOMENTS, full_moment, full_value

    done = []
    with distributed() as world:
        for case in cases:
            config, model = build_on_rank(base, case, world)
            engine = initialize(model, config, world)
            params = model.trainable()

            def state(engine=engine, params=params):
                values = [full_value(p) for p in params.values()]
                values += [full_moment(engine, p, m) for p in params.values() for m in MOMENTS]
                return [value.clone() for value in values]

            def step(harm=None, engine=engine, case=case):
                for index in range(case.accumulation):
                    batch = random_batch(rank, batch=2)
                    if harm and rank == 1 and index == 0:
                        harm(batch)
                    engine.backward(engine(**batch)["loss"])
                    engine.step()
                return engine.was_step_applied()

            assert step()
            names = []
            for harm in harms(model, case):
                before = state()
                assert not step(harm), (case, harm.__name__)
                after = state()
                assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), case
                assert step(), "and the next one goes on"
                assert not all(torch.equal(a, b) for a, b in zip(after, state(), strict=True))
                assert all(value.isfinite().all() for value in state())
                names.append(harm.__name__)
            assert engine.skipped_steps == len(names)
            engine.destroy()
            done.append(names)
    return done


def test_a_step_with_nan_or_inf_changes_nothing_on_any_rank(tmp_path):
    first, second = run_ranks(probe, 2, write_base(tmp_path), CASES, timeout=200)
    assert first == second
    assert [len(names) for names in first] == [3, 2, 3, 3, 2]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Like any other, but the base's last norm overflows: a folder with NaN would not load."""
    setting = write_setting(tmp_path_factory.mktemp("nan"))
    broken = setting["root"] / "broken"
    shutil.copytree(setting["hf"], broken)
    weights = load_file(broken / "model.safetensors")
    (norm,) = [name for name in weights if name.endswith("model.norm.weight")]
    weights[norm][:] = torch.finfo(torch.float32).max
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    return setting | {"hf": broken}


def test_a_run_that_skips_too_often_saves_and_stops(setting, tmp_path):
    config = make_config(setting, tmp_path / "run", train__steps=30, train__max_skipped_steps=3)
    first, second = run_ranks(train_all, 2, [config])
    assert first == second, "all ranks stop alike"
    assert first and "not finite" in first and "max_skipped_steps=3" in first
    (folder,) = [p for p in (tmp_path / "run/checkpoints").glob("step-*") if "4" in p.name]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["updates"]) == (4, 0)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["skipped_steps"] for line in lines] == [1, 2, 3, 4]
