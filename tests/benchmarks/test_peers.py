"""Every peer computes what ours does, on one rank and over two, before it is timed against it."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import optional_peers
from benchmarks.oracle import check
from benchmarks.problem import Ours, Problem
from benchmarks.shapes import Shape
from tests.helpers import run_ranks

SHAPE = Shape("small", 32, 16, 8, 4)
MEAN_K = 2.5


def errors(name: str, world) -> dict[str, float]:
    from benchmarks import peers

    problem = Problem.make(SHAPE, 40, torch.float32, world.device, world.rank)
    router = Ours(problem, MEAN_K if "padded" in name else SHAPE.top_k)
    layer = peers.build(name, problem, router, False, world)
    return check(name, layer, problem, router, norm_topk_prob=name in peers.RENORMALISES)


def on_rank(rank: int, names: list[str]) -> None:
    from gemoe_ds.engine.world import distributed

    with distributed() as world:
        for name in names:
            errors(name, world)


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        (1, ["hf_eager", "hf_grouped", "autoep", "autoep_grouped", "autoep_padded", "classic_moe"]),
        (2, ["autoep", "autoep_padded", "classic_moe"]),
    ],
)
def test_peers_agree_with_the_plain_computation(ranks, names):
    run_ranks(on_rank, ranks, names)


def test_the_check_sees_a_wrong_layer():
    problem = Problem.make(SHAPE, 40, torch.float32, torch.device("cpu"))
    ours, other = Ours(problem, MEAN_K), Ours(problem, SHAPE.top_k)
    check("itself", ours, problem, ours)
    with pytest.raises(AssertionError, match="is wrong, so there is nothing to time"):
        check("at another k", other, problem, ours)
    damaged = ours.layer.experts.down_EDF.clone()
    damaged[:, 0] *= 1.01
    ours.layer.experts.down_EDF = damaged  # of all that share them, not of the problem
    with pytest.raises(AssertionError, match="output"):
        check("with a damaged weight", ours, problem, Ours(problem, MEAN_K))


@pytest.mark.parametrize("mean_k", [1, 1.5, 2.5, 3.3, 4])
def test_mean_k_is_the_one_asked_for(mean_k):
    problem = Problem.make(SHAPE, 1000, torch.float32, torch.device("cpu"))
    mask_TE, _ = Ours(problem, mean_k).routing(problem.x_TD)
    assert mask_TE.sum() / 1000 == pytest.approx(mean_k, abs=0.01)


def test_a_peer_that_takes_no_part_says_why_and_how_it_would(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert optional_peers.why_not("autoep", torch.float32, cpu) is None
    assert "CUDA device" in optional_peers.why_not("megatron", torch.bfloat16, cpu)
    assert "bfloat16 whatever" in optional_peers.why_not("torchtitan", torch.float32, cpu)
    monkeypatch.setitem(sys.modules, "torchtitan", None)
    monkeypatch.setitem(sys.modules, "megatron", None)
    for name, device in (("torchtitan", cpu), ("megatron", cuda)):
        said = optional_peers.why_not(name, torch.bfloat16, device)
        assert said.startswith("not installed") and "pip install --no-deps --target" in said
        assert "\n" not in said


def test_torchtitan_agrees_with_the_plain_computation():
    pytest.importorskip("torchtitan", reason=optional_peers.INSTALL["torchtitan"])
    problem = Problem.make(SHAPE, 40, torch.bfloat16, torch.device("cpu"))
    layer = optional_peers.torchtitan_layer(problem, trainable=True)
    check("torchtitan", layer, problem, Ours(problem, SHAPE.top_k))
