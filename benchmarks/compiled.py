"""torch.compile beside eager mode: of one MoE layer, and of a training step's dense parts.

What compiling takes, once a process, stands beside what it gains in every step.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import Shape
from benchmarks.steps import (
    LENGTH,
    step_batch,
    step_config,
    step_model,
    training_step,
    write_tokenizer,
)
from benchmarks.timing import measure, paired
from gemoe_ds.engine.build import initialize
from gemoe_ds.engine.world import World
from gemoe_ds.moe.layer import MoELayer

EAGER, COMPILED = "eager", "compiled"
LAYER, STEP = "one MoE layer", "a training step, model.compile=dense"


def compile_rows(
    shape: Shape, num_tokens: int, dtype: torch.dtype, rounds: int, world: World
) -> list[dict[str, Any]]:
    """Both ways of each in turn: forward, forward and backward, and whole steps."""
    of = {"shape": shape.name, "tokens": num_tokens, "ep": 1, "mean_k": 0.0}
    rows = []
    layer = _layer(shape, dtype, world.device)
    twin = torch.compile(layer, dynamic=True)
    x_TD = torch.randn(num_tokens, shape.d_model, device=world.device).to(dtype)
    for mode in ("forward", "trainable"):
        runs = {EAGER: _run(layer, layer, x_TD, mode), COMPILED: _run(twin, layer, x_TD, mode)}
        rows += _timed(runs, rounds, of | {"layer": LAYER, "mode": mode})
    tokens = max(num_tokens // LENGTH, 1) * LENGTH
    with tempfile.TemporaryDirectory() as folder:
        runs = _steps(shape, tokens, dtype, world, write_tokenizer(Path(folder)))
        rows += _timed(runs, rounds, of | {"layer": STEP, "mode": "frozen", "tokens": tokens})
    return rows


def _layer(shape: Shape, dtype: torch.dtype, device: torch.device) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer.build(
        d_model=shape.d_model,
        d_ff=shape.width,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        dtype=dtype,
        device=device,
    )


def _run(
    call: Callable[[Tensor], Tensor], layer: MoELayer, x_TD: Tensor, mode: str
) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            call(x_TD)

    def both() -> None:
        y_TD = call(x_TD.detach().requires_grad_())
        (y_TD.float().square().mean() + layer.aux_loss()).backward()
        layer.zero_grad(set_to_none=True)

    return forward if mode == "forward" else both


def _steps(
    shape: Shape, num_tokens: int, dtype: torch.dtype, world: World, tokenizer: Path
) -> dict[str, Callable[[], Any]]:
    batch = step_batch(num_tokens // LENGTH, world.device)
    runs: dict[str, Callable[[], Any]] = {}
    model = None
    for name, how in ((EAGER, "none"), (COMPILED, "dense")):
        model = step_model("gemoe", shape, tokenizer, dtype, experts_of=model)
        engine = initialize(model, step_config("gemoe", how), world)
        model.train()
        runs[name] = training_step(engine, batch)
    return runs


def _timed(
    runs: dict[str, Callable[[], Any]], rounds: int, of: dict[str, Any]
) -> list[dict[str, Any]]:
    first = {}
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        first[name] = time.perf_counter() - start
    timings = measure(runs, rounds)
    over = paired(lambda compiled, eager: compiled / eager, timings[COMPILED], timings[EAGER])
    return [
        of
        | {"suite": "compile", "way": name, "first_call_s": round(first[name], 1)}
        | timing.row()
        | ({"over_eager": round(over, 4)} if name == COMPILED else {})
        for name, timing in timings.items()
    ]
