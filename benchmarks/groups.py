"""Contenders that take turns in one process, or on ranks that share experts: a table's rows.

Each is checked against the oracle before it is timed.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.contenders import (
    DENSE,
    PAPER_K,
    ROUTER,
    Contender,
    dense_runner,
    peer_contenders,
    router_runner,
    runner,
)
from benchmarks.oracle import check
from benchmarks.problem import Ours, Problem
from benchmarks.rows import OURS
from benchmarks.shapes import Shape
from benchmarks.timing import Timing, measure, paired, peak_memory
from gemoe_ds.engine.groups import expert_shard
from gemoe_ds.engine.world import World


def layer_group(
    shape: Shape,
    num_tokens: int,
    mean_ks: list[float],
    mode: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    peer_names: list[str],
    suite: str,
) -> list[dict[str, Any]]:
    """One process: our layer at every mean k, and the peers at the backbone's own k."""
    problem = Problem.make(shape, num_tokens, dtype, device)
    trainable = mode == "trainable"
    contenders = []
    for mean_k in map(float, mean_ks):
        ours = Ours(problem, mean_k, trainable=trainable)
        contenders += _ours_and_parts(ours, mean_k, problem, mode)
        if mean_k in (PAPER_K, shape.top_k):
            route = router_runner(ours, problem, mode)
            contenders.append(Contender(ROUTER, mean_k, route, contenders[-1].num_assignments))
    contenders += peer_contenders(problem, peer_names, mode, World(0, 1, device))
    return _rows(contenders, rounds, suite=suite, mode=mode, problem=problem, world_size=1)


def ep_group(
    shape: Shape,
    num_tokens: int,
    mean_ks: list[float],
    mode: str,
    *,
    dtype: torch.dtype,
    world: World,
    rounds: int,
    peer_names: list[str],
) -> list[dict[str, Any]]:
    """All ranks share one set of experts: our layer at every mean k, and the peers."""
    problem = Problem.make(shape, num_tokens, dtype, world.device, world.rank)
    shard = expert_shard(world.size, world)
    contenders = []
    for mean_k in map(float, mean_ks):
        dispatcher = shard.make_dispatcher()
        local = shard.local(shape.num_experts)
        ours = Ours(problem, mean_k, dispatcher=dispatcher, local=local)
        contenders += _ours_and_parts(ours, mean_k, problem, mode, f", EP {world.size}")
    contenders += peer_contenders(problem, peer_names, mode, world)
    return _rows(contenders, rounds, suite="ep", mode=mode, problem=problem, world_size=world.size)


def _ours_and_parts(
    ours: Ours, mean_k: float, problem: Problem, mode: str, where: str = ""
) -> list[Contender]:
    """Our layer, checked; at the k of the headline and the largest a dense product beside it, of
    all ranks at once, as their layers are."""
    num_assignments = int(ours.routing(problem.x_TD)[0].sum())
    errors = check(f"{OURS} at mean k {mean_k}{where}", ours, problem, ours)
    run = runner(ours, problem, mode)
    found = [Contender(OURS, mean_k, run, num_assignments, errors, ours)]
    if mean_k in (PAPER_K, problem.shape.top_k):
        dense = dense_runner(problem, num_assignments, mode)
        found.append(Contender(DENSE, mean_k, dense, num_assignments))
    return found


def _rows(
    contenders: list[Contender],
    rounds: int,
    *,
    suite: str,
    mode: str,
    problem: Problem,
    world_size: int,
) -> list[dict[str, Any]]:
    keys = [f"{c.name} {c.mean_k}" for c in contenders]
    runs = {key: c.run for key, c in zip(keys, contenders, strict=True)}
    timings = measure(runs, rounds)
    rows = []
    for key, contender in zip(keys, contenders, strict=True):
        timing = timings[key]
        num_tokens = problem.x_TD.shape[0]
        products = {"forward": 1, "frozen": 2, "trainable": 3}[mode]
        flops = products * problem.shape.forward_flops(contender.num_assignments)
        row = {
            "suite": suite,
            "layer": contender.name,
            "mean_k": round(contender.num_assignments / num_tokens, 3),
            "mode": mode,
            "shape": problem.shape.name,
            "tokens": num_tokens,
            "ep": world_size,
            **timing.row(),
            "tokens_per_s": round(world_size * num_tokens / timing.median),
            "gflops_per_s": round(flops * world_size / timing.median / 1e9, 1),
        }
        if contender.name != ROUTER and contender.name != DENSE:
            row["peak_bytes"] = peak_memory(contender.run)
        if contender.errors:
            row["errors"] = {what: float(f"{e:.2g}") for what, e in contender.errors.items()}
        row |= _ratios(contender, contenders, keys, timings)
        if isinstance(contender.module, Ours) and world_size > 1:
            row["traffic"] = _traffic(contender.module, problem)
        rows.append(row)
    return rows


def _ratios(
    contender: Contender,
    contenders: list[Contender],
    keys: list[str],
    timings: dict[str, Timing],
) -> dict[str, float]:
    """Paired figures of a layer's row."""
    if contender.name in (DENSE, ROUTER):
        return {}
    own = timings[f"{contender.name} {contender.mean_k}"]
    largest = max((c for c in contenders if c.name == OURS), key=lambda c: c.mean_k)
    ratios = {}
    if contender.name == OURS and contender is not largest:
        saved = 1 - contender.num_assignments / largest.num_assignments
        full = timings[f"{OURS} {largest.mean_k}"]
        ratios["realised_over_ideal"] = paired(lambda t8, t: (t8 - t) / (t8 * saved), full, own)
    for name, figure in ((DENSE, "dense_rate_share"), (ROUTER, "router_share")):
        key = f"{name} {contender.mean_k}"
        if key in keys and (name == DENSE or contender.name == OURS):
            ratios[figure] = paired(lambda part, whole: part / whole, timings[key], own)
    return {figure: round(value, 4) for figure, value in ratios.items()}


def _traffic(ours: Ours, problem: Problem) -> dict[str, int]:
    """Of one forward pass of this rank, counted by the dispatcher and worked out from the mask."""
    traffic = ours.dispatcher.traffic  # type: ignore[attr-defined]
    before = (traffic.rows, traffic.row_bytes, traffic.metadata_bytes)
    runner(ours, problem, "forward")()
    after = (traffic.rows, traffic.row_bytes, traffic.metadata_bytes)
    rows, row_bytes, metadata = (b - a for a, b in zip(before, after, strict=True))
    mask_TE, _ = ours.routing(problem.x_TD)
    ranks, rank = ours.dispatcher.num_ranks, ours.dispatcher.rank  # type: ignore[attr-defined]
    per_rank_TR = mask_TE.view(len(mask_TE), ranks, -1).any(2)
    pairs = int(per_rank_TR.sum() - per_rank_TR[:, rank].sum())
    d_model, itemsize = problem.x_TD.shape[1], problem.x_TD.itemsize
    assert (rows, row_bytes) == (pairs, 2 * pairs * d_model * itemsize)
    local = mask_TE.view(len(mask_TE), ranks, -1)[:, rank].sum()
    forwarded = 2 * int(mask_TE.sum() - local) * d_model * itemsize
    return {
        "pairs": pairs,
        "row_bytes": row_bytes,
        "metadata_bytes": metadata,
        "row_bytes_if_every_assignment_travelled": forwarded,
    }
