"""A trace of the expert-parallel layer with a shared expert: what runs while rows travel.

The trace opens in chrome://tracing or Perfetto. The same spans, in milliseconds, go into the
results: a span of an exchange begins when it is started and ends when it has been waited for.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.problem import Ours, Problem
from gemoe_ds.engine.groups import expert_shard
from gemoe_ds.engine.world import World
from gemoe_ds.moe.dispatch import AllToAllDispatcher


class _Spans:
    """Named spans of this process, from the first one on."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []

    def add(self, name: str, start: float, **more: Any) -> None:
        self.spans.append({"name": name, "start": start, "end": time.perf_counter(), **more})

    def rows(self) -> list[dict[str, Any]]:
        first = min(span["start"] for span in self.spans)
        ordered = sorted(self.spans, key=lambda span: span["start"])
        return [
            span | {edge: round(1e3 * (span[edge] - first), 2) for edge in ("start", "end")}
            for span in ordered
        ]


class _Work:
    def __init__(self, work: Any, spans: _Spans, start: float, elements: int) -> None:
        self.work, self.spans, self.start, self.elements = work, spans, start, elements

    def wait(self) -> None:
        waited = time.perf_counter()
        with record_function("all_to_all: wait"):
            self.work.wait()
        stood = round(1e3 * (time.perf_counter() - waited), 2)
        self.spans.add("all_to_all", self.start, elements=self.elements, waited_ms=stood)


class _Shared(nn.Module):
    """A shared expert of the routed ones' width times their number in use, as DeepSeek's."""

    def __init__(self, problem: Problem, spans: _Spans) -> None:
        super().__init__()
        d, f = problem.shape.d_model, 2 * problem.shape.width
        dtype = problem.x_TD.dtype
        self.gate_up = nn.Linear(d, 2 * f, bias=False, dtype=dtype).requires_grad_(False)
        self.down = nn.Linear(f, d, bias=False, dtype=dtype).requires_grad_(False)
        self.spans = spans

    def forward(self, x_TD: Tensor) -> Tensor:
        start = time.perf_counter()
        with record_function("shared expert"):
            gate, up = self.gate_up(x_TD).chunk(2, -1)
            out: Tensor = self.down(nn.functional.silu(gate) * up)
        self.spans.add("shared expert", start)
        return out


def trace(problem: Problem, mean_k: float, world: World, out: Path | None) -> list[dict[str, Any]]:
    """Spans of one forward and backward pass of this rank; the first rank writes the trace."""
    spans = _Spans()
    shard = expert_shard(world.size, world)
    inner = shard.make_dispatcher()
    assert isinstance(inner, AllToAllDispatcher)
    start_exchange: Callable[..., Any] = inner.all_to_all

    def all_to_all(output: Tensor, rows: Tensor, *splits: list[int]) -> _Work:
        start = time.perf_counter()
        with record_function("all_to_all: start"):
            work = start_exchange(output, rows, *splits)
        return _Work(work, spans, start, rows.numel())

    dispatcher = AllToAllDispatcher(all_to_all, inner.rank, inner.num_ranks)
    local = shard.local(problem.shape.num_experts)
    shared = _Shared(problem, spans).to(world.device)
    ours = Ours(problem, mean_k, dispatcher=dispatcher, local=local, shared=shared)

    def run() -> None:
        start = time.perf_counter()
        y_TD = ours(problem.x_TD.detach().requires_grad_())
        spans.add("forward", start)
        start = time.perf_counter()
        y_TD.backward(problem.grad_TD)
        spans.add("backward", start)

    run()
    spans.spans.clear()
    kinds = [ProfilerActivity.CPU]
    if world.device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as profiler:
        run()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
    if world.is_first and out is not None:
        _write_trace(profiler, out)
    return spans.rows()


def _write_trace(profiler: Any, out: Path) -> None:
    """Compressed; without the call stacks and shapes that nobody reads."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        events = json.loads(plain.read_text())
    with gzip.open(out, "wt", encoding="utf-8") as file:
        json.dump(events, file)
