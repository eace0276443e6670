"""Whole runs that start from a dense model: trained over ranks, exported, trained further."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gemoe_ds.checkpoint.state import load_trained
from gemoe_ds.cli.export import main as export
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.train.assemble import build_model
from tests.helpers import run_python, run_ranks
from tests.models.upcycled.small import (
    load,
    make_config,
)
from tests.train.resuming import BOUND, losses, train_all

THIRD_STAGE = ("ltdr", "dynmoe")
FROZEN = {"ada_k": {"name": "ada_k"}, "evomoe": {"name": "evomoe", "gate": "frozen"}}


@pytest.fixture(scope="module")
def runs(setting, tmp_path_factory):
    """All that start from the dense model, by name: one process group for one rank, one for two."""
    root = tmp_path_factory.mktemp("runs")

    def config(name, router, ep_size, zero):
        return make_config(setting, root / name, router, ep_size, zero)

    alone = [config(f"{name}-alone", {"name": name}, 1, 0) for name in THIRD_STAGE]
    alone += [config(name, router, 1, 0) for name, router in FROZEN.items()]
    shared = [config("evolve", {"name": "evolve"}, 1, 2)]
    for name in THIRD_STAGE:
        shared.append(config(f"{name}-shared", {"name": name}, 2, 2))
        shared.append(config(f"{name}-zero3", {"name": name}, 2, 3))
    assert run_ranks(train_all, 1, alone) == [None]
    assert run_ranks(train_all, 2, shared) == [None, None]
    return {Path(config.output_dir).name: config for config in alone + shared}


@pytest.mark.parametrize("router", THIRD_STAGE)
def test_trainable_experts_over_ranks_equal_one_process(runs, router):
    """MoE-LLaVA's third stage, as LTDR and DynMoE use it."""
    ways = ("alone", "shared", "zero3")
    folder = {way: Path(runs[f"{router}-{way}"].output_dir) for way in ways}
    expected = losses(folder["alone"])
    for way in ("shared", "zero3"):
        for step, loss in losses(folder[way]).items():
            assert loss == pytest.approx(expected[step], rel=BOUND), (way, step)
    stored = load_trained(folder["shared"] / "checkpoints/step-000004")
    kinds = {name.rsplit(".", 1)[1] for name in stored if ".experts." in name}
    assert kinds == {"gate_up_EGD", "down_EDF"}


def test_evolved_then_routed(setting, runs, tmp_path):
    """EvoMoE: stage II, export, and stage III on what came out, which is no longer all copies."""
    evolve = Path(runs["evolve"].output_dir)
    command = ["launch/export.py", evolve / "config.yaml"]
    command += ["--trained", evolve, "--out", tmp_path / "hf"]
    done = run_python(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "hf/config.json").read_text())["upcycled"]["num_experts"] == 4

    model = load(setting, tmp_path / "hf", router="evomoe", train="routers")
    stored = load_trained(evolve / "checkpoints/step-000004")
    dense = load(setting)
    for layer, plain in zip(model.moe_layers, dense.moe_layers, strict=True):
        start, now = plain.experts.gate_up_EGD[0], layer.experts.gate_up_EGD
        steps = [(now[e] - start).norm() for e in range(4)]
        assert steps[0] > steps[3] > steps[2] > steps[1] > 0, "further, the smaller its beta"
    name = next(n for n in stored if n.endswith("gate_up_EGD"))
    assert torch.equal(model.moe_layers[0].experts.gate_up_EGD, stored[name])

    routed = make_config(
        setting,
        tmp_path / "routed",
        {"name": "evomoe", "k": 1},
        2,
        2,
        checkpoint=str(tmp_path / "hf"),
        trainable="routers",
    )
    assert run_ranks(train_all, 2, [routed]) == [None, None]


def test_a_frozen_gate_is_exported_as_the_run_had_it(setting, runs, tmp_path):
    """The dense base has none: it was drawn, and is in the checkpoint though it does not train."""
    for name in FROZEN:
        config = runs[name]
        run, out = Path(config.output_dir), tmp_path / f"{name}-hf"
        recipe = [str(run / "config.yaml"), "seed=5"]
        export([*recipe, "--trained", str(run), "--out", str(out)])
        model, exported = build_model(config, ExpertShard()), load(setting, out)
        for ours, theirs in zip(model.moe_layers, exported.moe_layers, strict=True):
            assert torch.equal(ours.router.gate.weight, theirs.router.gate.weight), name
