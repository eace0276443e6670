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

from benchmarks.compiled import compile_rows
from benchmarks.contenders import PAPER_K
from benchmarks.groups import ep_group, layer_group
from benchmarks.monotonic import monotonic_rows
from benchmarks.problem import Problem
from benchmarks.quantised import quantised_rows
from benchmarks.rows import EXCHANGE, OURS
from benchmarks.shapes import SHAPES, Shape
from benchmarks.stages import stage_rows
from benchmarks.steps import steps_suite
from benchmarks.timeline import trace
from benchmarks.timing import free_memory, measure
from gemoe_ds.engine.world import World

MODES = ("forward", "frozen", "trainable")
SWEEP = [1, 2, 3, 4, PAPER_K, 6, 7, 8]
PEERS = ["autoep", "autoep_grouped", "hf_eager", "hf_grouped", "autoep_padded"]
PEERS += ["torchtitan", "megatron"]
RANKED_PEERS = ["autoep", "autoep_padded"]


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    shape: str
    tokens: int
    dtype: torch.dtype
    rounds: int
    trace: Path | None = None  # where the timeline's trace goes
    modes: tuple[str, ...] = MODES  # of the suite `layer`, as is `mean_ks`
    mean_ks: tuple[float, ...] = tuple(SWEEP)


def layer_suite(options: Options, world: World) -> list[dict[str, Any]]:
    """The headline: every mean k, every mode, all peers."""
    shape, rows = SHAPES[options.shape], []
    for mode in options.modes:
        sweep = [k for k in options.mean_ks if k <= shape.top_k]
        if mode == "trainable":
            sweep = [k for k in sweep if k in (PAPER_K, shape.top_k)]
        names = PEERS
        if mode == "trainable":
            names = ["autoep", "hf_eager", "hf_grouped", "torchtitan", "megatron"]
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


def monotonic_suite(options: Options, world: World) -> list[dict[str, Any]]:
    """GeMoE's loss alone, against the obvious way and the time of the layer that it belongs to."""
    shape = SHAPES[options.shape]
    most = options.tokens
    return [
        row
        for num_tokens in sorted({max(most // 4, 1), most, 4 * most})
        for row in monotonic_rows(shape, num_tokens, options.dtype, world.device, options.rounds)
    ]


def compile_suite(options: Options, world: World) -> list[dict[str, Any]]:
    """torch.compile beside eager mode."""
    shape = SHAPES[options.shape]
    return compile_rows(shape, options.tokens, options.dtype, options.rounds, world)


def quantised_suite(options: Options, world: World) -> list[dict[str, Any]]:
    """Experts in 8 and 4 bits beside those in the dtype of the products."""
    shape = SHAPES[options.shape]
    return quantised_rows(shape, options.tokens, options.dtype, world.device, options.rounds)


Suite = Callable[[Options, World], list[dict[str, Any]]]
SUITES: dict[str, Suite] = {
    "layer": layer_suite,
    "tokens": tokens_suite,
    "shapes": shapes_suite,
    "stages": stages_suite,
    "steps": whole_steps_suite,
    "timeline": timeline_suite,
    "monotonic": monotonic_suite,
    "compile": compile_suite,
    "quantised": quantised_suite,
    "ep": ep_suite,
    "links": links_suite,  # between two hosts, over links of several rates
}
