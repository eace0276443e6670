"""Whole runs that start from a dense model: trained over ranks, exported, trained further."""

from __future__ import annotations

import json
import subprocess
import sys

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


@pytest.mark.parametrize("router", ["ltdr", "dynmoe"])
def test_trainable_experts_over_ranks_equal_one_process(setting, tmp_path, router):
    """MoE-LLaVA's third stage, as LTDR and DynMoE use it."""
    options = {"name": router}
    runs = {
        "alone": make_config(setting, tmp_path / "alone", options, 1, 0),
        "shared": make_config(setting, tmp_path / "shared", options, 2, 2),
        "zero3": make_config(setting, tmp_path / "zero3", options, 2, 3),
    }
    assert run_ranks(train_all, 1, [runs["alone"]]) == [None]
    assert run_ranks(train_all, 2, [runs["shared"], runs["zero3"]]) == [None, None]
    expected = losses(tmp_path / "alone")
    for way in ("shared", "zero3"):
        for step, loss in losses(tmp_path / way).items():
            assert loss == pytest.approx(expected[step], rel=BOUND), (way, step)
    stored = load_trained(tmp_path / "shared/checkpoints/step-000004")
    kinds = {name.rsplit(".", 1)[1] for name in stored if ".experts." in name}
    assert kinds == {"gate_up_EGD", "down_EDF"}


def test_evolved_then_routed(setting, tmp_path):
    """EvoMoE: stage II, export, and stage III on what came out, which is no longer all copies."""
    evolve = make_config(setting, tmp_path / "evolve", {"name": "evolve"}, 1, 2)
    assert run_ranks(train_all, 2, [evolve]) == [None, None]
    command = ["launch/export.py", tmp_path / "evolve/config.yaml"]
    command += ["--trained", tmp_path / "evolve", "--out", tmp_path / "hf"]
    done = run_python(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "hf/config.json").read_text())["upcycled"]["num_experts"] == 4

    model = load(setting, tmp_path / "hf", router="evomoe", train="routers")
    stored = load_trained(tmp_path / "evolve/checkpoints/step-000004")
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


def test_a_frozen_gate_is_exported_as_the_run_had_it(setting, tmp_path):
    """The dense base has none: it was drawn, and is in the checkpoint though it does not train."""
    routers = {"ada_k": {"name": "ada_k"}, "evomoe": {"name": "evomoe", "gate": "frozen"}}
    runs = {n: make_config(setting, tmp_path / n, router, 1, 0) for n, router in routers.items()}
    assert run_ranks(train_all, 1, list(runs.values())) == [None]
    for name, config in runs.items():
        run, out = tmp_path / name, tmp_path / f"{name}-hf"
        recipe = [str(run / "config.yaml"), "seed=5"]
        export([*recipe, "--trained", str(run), "--out", str(out)])
        model, exported = build_model(config, ExpertShard()), load(setting, out)
        for ours, theirs in zip(model.moe_layers, exported.moe_layers, strict=True):
            assert torch.equal(ours.router.gate.weight, theirs.router.gate.weight), name


def test_exported_model_runs_without_this_package(setting, tmp_path):
    config = make_config(setting, tmp_path / "run", {"name": "ltdr"}, 1, 0)
    assert run_ranks(train_all, 1, [config]) == [None]
    command = ["launch/export.py", tmp_path / "run/config.yaml"]
    command += ["--trained", tmp_path / "run", "--out", tmp_path / "hf"]
    done = run_python(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    code = (
        "import sys, torch; sys.modules['gemoe_ds'] = None\n"
        "from transformers import AutoModelForImageTextToText as Auto\n"
        f"m = Auto.from_pretrained({str(tmp_path / 'hf')!r}, trust_remote_code=True).eval()\n"
        "ids = torch.tensor([[1, 3, 3, 3, 3, 7, 8]])\n"
        "m(ids, pixel_values=torch.randn(1, 3, 16, 16))\n"
        "print([sorted(set(k.flatten().tolist())) for k in m.k_per_layer])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("]]")
