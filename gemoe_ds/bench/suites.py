"""What is timed: rows of a results file, each checked against the oracle before.

A row names its suite, layer, mean k, mode ("forward", "frozen": forward and backward with frozen
experts, "trainable"), shape, tokens a rank and EP size. Everything in one group of rows was timed
in turn, round after round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gemoe_ds.bench import peers
from gemoe_ds.bench.oracle import check
from gemoe_ds.bench.problem import Ours, Problem
from gemoe_ds.bench.shapes import SHAPES, Shape
from gemoe_ds.bench.stages import stage_rows
from gemoe_ds.bench.steps import steps_suite
from gemoe_ds.bench.timeline import trace
from gemoe_ds.bench.timing import Timing, free_memory, measure, paired, peak_memory
from gemoe_ds.engine.distributed import World
from gemoe_ds.engine.groups import expert_shard

OURS, DENSE, ROUTER = "gemoe_ds", "dense product", "router alone"
EXCHANGE = "plain exchange"  # an all-to-all of nothing else
MODES = ("forward", "frozen", "trainable")
PAPER_K = 5.1  # mean k at which the headline figure is quoted, of 8


@dataclass
class Contender:
    """A layer (or a part of one) at one mean k."""

    name: str
    mean_k: float
    run: Callable[[], Any]
    num_assignments: int
    errors: dict[str, float] | None = None
    module: nn.Module | None = None


def runner(module: nn.Module, problem: Problem, mode: str) -> Callable[[], Any]:
    """One forward pass, or one with its backward pass, auxiliary losses of ours included."""
    if mode == "forward":

        def forward() -> None:
            with torch.no_grad():
                module(problem.x_TD)

        return forward

    def both() -> None:
        y_TD = module(problem.x_TD.detach().requires_grad_())
        losses = module.losses() if isinstance(module, Ours) else []
        grads = [problem.grad_TD, *(None for _ in losses)]
        torch.autograd.backward([y_TD, *losses], grads)
        module.zero_grad(set_to_none=True)

    return both


class RouterAlone(nn.Module):
    """What routing costs: scores, choice, losses and the plan, with their gradients."""

    def __init__(self, ours: Ours) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x_TD: Tensor) -> Tensor:
        ours = self.ours
        ours.ctx.begin(
            torch.ones(1, len(x_TD), dtype=torch.bool, device=x_TD.device), x_TD[None, :, 0] < -9
        )
        plan = ours.layer.router(x_TD, ours.ctx)
        loss = plan.weights_A.sum()
        for term in ours.losses():
            loss = loss + term
        return loss


def router_runner(ours: Ours, problem: Problem, mode: str) -> Callable[[], Any]:
    router = RouterAlone(ours)

    def forward() -> None:
        with torch.no_grad():
            router(problem.x_TD)

    def both() -> None:
        router(problem.x_TD.detach().requires_grad_()).backward()
        ours.zero_grad(set_to_none=True)

    return forward if mode == "forward" else both


def dense_runner(problem: Problem, num_assignments: int, mode: str) -> Callable[[], Any]:
    """One product of as many operations as the experts' forward pass, once or as often as needed.

    The backward pass with frozen experts multiplies as much again, with trainable ones twice.
    """
    shape, dtype, device = problem.shape, problem.x_TD.dtype, problem.x_TD.device
    rows = torch.randn(num_assignments, shape.d_model, device=device).to(dtype)
    weight = torch.randn(3 * shape.width, shape.d_model, device=device).to(dtype)
    times = {"forward": 1, "frozen": 2, "trainable": 3}[mode]

    def run() -> None:
        for _ in range(times):
            rows @ weight.t()

    return run


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
        num_assignments = int(ours.routing(problem.x_TD)[0].sum())
        errors = check(f"{OURS} at mean k {mean_k}", ours, problem, ours)
        run = runner(ours, problem, mode)
        contenders.append(Contender(OURS, mean_k, run, num_assignments, errors, ours))
        if mean_k in (PAPER_K, shape.top_k):
            contenders.append(
                Contender(ROUTER, mean_k, router_runner(ours, problem, mode), num_assignments)
            )
            contenders.append(
                Contender(
                    DENSE, mean_k, dense_runner(problem, num_assignments, mode), num_assignments
                )
            )
    contenders += _peer_contenders(problem, peer_names, mode, World(0, 1, device))
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
        num_assignments = int(ours.routing(problem.x_TD)[0].sum())
        errors = check(f"{OURS} at mean k {mean_k}, EP {world.size}", ours, problem, ours)
        run = runner(ours, problem, mode)
        contenders.append(Contender(OURS, mean_k, run, num_assignments, errors, ours))
        if mean_k in (PAPER_K, shape.top_k):  # of all ranks at once, as their layers are
            dense = dense_runner(problem, num_assignments, mode)
            contenders.append(Contender(DENSE, mean_k, dense, num_assignments))
    contenders += _peer_contenders(problem, peer_names, mode, world)
    return _rows(contenders, rounds, suite="ep", mode=mode, problem=problem, world_size=world.size)


def _peer_contenders(
    problem: Problem, names: list[str], mode: str, world: World
) -> list[Contender]:
    """The peers on the same weights at the backbone's k, and one that is padded at the paper's."""
    found = []
    top_k = problem.shape.top_k
    for name in names:
        mean_k = PAPER_K if "padded" in name else float(top_k)
        router = Ours(problem, mean_k, local=slice(0, 1))  # routes; its experts are not used
        module = peers.build(name, problem, router, mode == "trainable", world)
        num_assignments = int(router.routing(problem.x_TD)[0].sum())
        errors = check(name, module, problem, router, renormalise=name in peers.RENORMALISES)
        run = runner(module, problem, mode)
        found.append(Contender(name, mean_k, run, num_assignments, errors))
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


SWEEP = [1, 2, 3, 4, PAPER_K, 6, 7, 8]
PEERS = ["autoep", "autoep_grouped", "hf_eager", "hf_grouped", "autoep_padded"]
RANKED_PEERS = ["autoep", "autoep_padded"]


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    shape: str
    tokens: int
    dtype: torch.dtype
    rounds: int
    trace: Path | None = None  # where the timeline's trace goes


def layer_suite(options: Options, world: World) -> list[dict[str, Any]]:
    """The headline: every mean k, every mode, all peers."""
    shape, rows = SHAPES[options.shape], []
    for mode in MODES:
        sweep = [k for k in SWEEP if k <= shape.top_k] if mode != "trainable" else [PAPER_K, 8]
        names = PEERS if mode != "trainable" else ["autoep", "hf_eager", "hf_grouped"]
        rows += _layer(options, world, "layer", shape, options.tokens, sweep, mode, names)
    return rows


# AutoEP's backward pass and the float32 computation that it is checked against, at OLMoE's shape.
BYTES_A_TOKEN = 2**20


def tokens_suite(options: Options, world: World) -> list[dict[str, Any]]:
    """From 256 to 32k tokens."""
    rows: list[dict[str, Any]] = []
    for num_tokens in (256, 1024, 4096, 16384, 32768):
        if num_tokens * BYTES_A_TOKEN > free_memory():
            print(f"   {num_tokens} tokens: not run, too little memory", flush=True)
            continue
        for mode in MODES[:2]:
            few = replace(options, rounds=options.rounds if num_tokens < 16384 else 3)
            shape = SHAPES[options.shape]
            sweep = [PAPER_K, shape.top_k]
            # DeepSpeed's older layer holds arrays of tokens x experts x capacity
            names = ["autoep", "classic_moe"] if num_tokens <= 1024 else ["autoep"]
            rows += _layer(few, world, "tokens", shape, num_tokens, sweep, mode, names)
    return rows


def shapes_suite(options: Options, world: World) -> list[dict[str, Any]]:
    """The layers of the other backbones, at 0.64 of their own k and at it."""
    rows = []
    for shape in SHAPES.values():
        if shape.name != options.shape:
            sweep = [round(shape.top_k * PAPER_K / 8, 2), shape.top_k]
            for mode in MODES[:2]:
                rows += _layer(
                    options, world, "shapes", shape, options.tokens, sweep, mode, ["autoep"]
                )
    return rows


def ep_suite(options: Options, world: World) -> list[dict[str, Any]]:
    """Experts over all ranks of this launch."""
    shape, rows = SHAPES[options.shape], []
    for mode in MODES[:2]:
        rows += ep_group(
            shape,
            options.tokens,
            [2, PAPER_K, shape.top_k],
            mode,
            dtype=options.dtype,
            world=world,
            rounds=options.rounds,
            peer_names=RANKED_PEERS,
        )
    return rows


def links_suite(options: Options, world: World) -> list[dict[str, Any]]:
    """The `ep` suite, and what the link itself takes: a small message, and a large one."""
    runs = {}
    for num_bytes in (2**10, 2**22):
        given = torch.zeros(world.size, num_bytes, dtype=torch.uint8, device=world.device)
        runs[num_bytes] = partial(dist.all_to_all_single, torch.empty_like(given), given)
    timings = measure({str(size): run for size, run in runs.items()}, max(options.rounds, 5))
    of = {"layer": EXCHANGE, "mode": EXCHANGE, "shape": options.shape, "tokens": 0, "mean_k": 0.0}
    rows = [of | {"ep": world.size, "bytes": n} | timings[str(n)].row() for n in runs]
    return rows + ep_suite(options, world)


def _layer(
    options: Options,
    world: World,
    suite: str,
    shape: Shape,
    num_tokens: int,
    sweep: list[float],
    mode: str,
    peer_names: list[str],
) -> list[dict[str, Any]]:
    return layer_group(
        shape,
        num_tokens,
        sweep,
        mode,
        dtype=options.dtype,
        device=world.device,
        rounds=options.rounds,
        peer_names=peer_names,
        suite=suite,
    )


def stages_suite(options: Options, world: World) -> list[dict[str, Any]]:
    """Time and bytes of every stage of the experts, on a CPU."""
    if world.device.type != "cpu":
        return []
    shape = SHAPES[options.shape]
    problem = Problem.make(shape, options.tokens, options.dtype, world.device)
    return [row for k in (PAPER_K, shape.top_k) for row in stage_rows(problem, k)]


def timeline_suite(options: Options, world: World) -> list[dict[str, Any]]:
    """What overlaps with what over the ranks of this launch."""
    shape = SHAPES[options.shape]
    problem = Problem.make(shape, options.tokens, options.dtype, world.device, world.rank)
    return [
        {
            "suite": "timeline",
            "layer": OURS,
            "mean_k": PAPER_K,
            "mode": "frozen",
            "shape": shape.name,
            "tokens": options.tokens,
            "ep": world.size,
            "spans": trace(problem, PAPER_K, world, options.trace),
        }
    ]


def whole_steps_suite(options: Options, world: World) -> list[dict[str, Any]]:
    """Training steps of a model of two layers."""
    shape = SHAPES[options.shape]
    return steps_suite(shape, options.tokens, options.dtype, options.rounds, world)


Suite = Callable[[Options, World], list[dict[str, Any]]]
SUITES: dict[str, Suite] = {
    "layer": layer_suite,
    "tokens": tokens_suite,
    "shapes": shapes_suite,
    "stages": stages_suite,
    "steps": whole_steps_suite,
    "timeline": timeline_suite,
    "ep": ep_suite,
    "links": links_suite,  # between two hosts, over links of several rates
}
