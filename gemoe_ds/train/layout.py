"""How a run lies on its ranks: how many share the experts, and what `--estimate` says of that.

Inside a host an exchange of rows is cheap, between hosts it is not; and where a rank holds all
experts there is none. So `parallel.ep_size: auto` takes the fewest ranks whose share of the experts
fits into their memory, inside a host.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gemoe_ds.cluster.preflight import free_for_a_rank, ranks_by_host
from gemoe_ds.config import RunConfig
from gemoe_ds.config.deepspeed_file import AUTO
from gemoe_ds.data.mixture import SampleList, open_training
from gemoe_ds.engine.world import World, broadcast_from_first, gather_objects
from gemoe_ds.models.blocks import BlockSpec
from gemoe_ds.models.cost.layer_time import (
    ALPHA_NETWORK,
    EFFICIENCY,
    INFINIBAND,
    LINK_EFFICIENCY,
    NVLINK,
    PEAK,
    TRIPS,
    Layer,
    h100,
)
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.train.assemble import collator_of, named_backbone
from gemoe_ds.train.checks.samples import Checked, check_samples, mean_length
from gemoe_ds.train.estimate import CONNECTIONS, Estimate, estimate
from gemoe_ds.train.profiling import resident_memory

GIB = 2**30
GPUS_OF_A_HOST = 8
GPU_GIB = 80
_STAGES = ("zero0", "zero2", "zero3")


def with_ep_size(
    config: RunConfig, samples: SampleList, world: World, checked: Checked
) -> tuple[RunConfig, str]:
    """`config` with a number for `parallel.ep_size: auto`, and why. Collective."""
    if config.parallel.ep_size != AUTO:
        return config, ""
    on_host = ranks_by_host()
    shared = 1 if world.device.type == "cuda" else max(on_host.values())
    free = min(gather_objects(free_for_a_rank(world.device, on_host[socket.gethostname()])))

    def choose() -> tuple[int, int]:
        """The number, and the bytes that a rank needs with it."""
        sizes = _sizes(_blocks(config), world.size, min(on_host.values()))
        for ep_size in sizes:
            expected = estimate(
                config.with_ep_size(ep_size), samples, world.size, world.device, checked
            )
            needed = still_needed(expected, shared, world.device)
            if needed <= free:
                break
        return ep_size, needed

    ep_size, needed = broadcast_from_first(choose, world)
    why = f"a rank needs {needed / GIB:.2f} GiB more, of {free / GIB:.2f} free"
    fewest = "the fewest that fit" if needed <= free else "the most inside a host, and do not fit"
    return config.with_ep_size(ep_size), f"parallel.ep_size=auto: {ep_size}, {fewest}: {why}"


def still_needed(expected: Estimate, ranks_of_host: int, device: torch.device) -> int:
    """Bytes of a rank, and of what it does not allocate through torch, without those that it has
    already; common memory is shared."""
    shared = expected.common * (ranks_of_host - 1) // ranks_of_host
    held = resident_memory() if device.type == "cpu" else 0
    return expected.total - shared + expected.beside.get(CONNECTIONS, 0) - held


def _blocks(config: RunConfig) -> list[BlockSpec]:
    """Of the backbone, as shapes."""
    backbone, base = named_backbone(config), config.model.checkpoint
    hf = backbone.load(Path(base) if base else None, Path(config.data.tokenizer))
    return backbone.moe_blocks(hf)


def _sizes(blocks: list[BlockSpec], num_ranks: int, most: int) -> list[int]:
    """Numbers of ranks that may share the experts."""
    experts = blocks[0].routing.num_experts
    return [n for n in range(1, most + 1) if num_ranks % n == 0 and experts % n == 0]


@dataclass(frozen=True)
class Row:
    """A way to lay the run on its ranks; bytes and seconds of one rank and micro-batch."""

    ep_size: int
    stage: str
    needed: int  # bytes of memory
    nvlink: float  # bytes sent inside the host
    network: float  # bytes sent to other hosts
    seconds: float


def print_layouts(config: RunConfig, num_ranks: int, gpu_gib: float | None = None) -> None:
    """The estimate for so many GPUs, and every other way to lay the run on them."""
    samples = open_training(config.data.train_path)
    backbone, base = named_backbone(config), config.model.checkpoint
    hf = backbone.load(Path(base) if base else None, Path(config.data.tokenizer))
    blocks = backbone.moe_blocks(hf)
    collator = collator_of(config, backbone, hf)
    checked = check_samples(config, samples, collator, num_ranks=num_ranks)
    assert checked is not None, "this is the first rank"
    tokens = config.train.micro_batch_size * mean_length(config, checked, num_ranks)
    gpu = torch.device("cuda")
    free = (gpu_gib or _present_gib()) * GIB
    num_parameters = sum(p.numel() for p in hf.parameters())
    rows = []
    sizes = set(_sizes(blocks, num_ranks, min(num_ranks, 8 * GPUS_OF_A_HOST)))
    if config.parallel.ep_size != AUTO:  # is shown, however large; ConfigError as in a run
        ExpertShard(num_ranks=config.ep_size).local(blocks[0].routing.num_experts)
        sizes.add(config.ep_size)
    for ep_size in sorted(sizes):
        for stage in _STAGES:
            laid = config.with_ep_size(ep_size).with_deepspeed(stage)
            expected = estimate(laid, samples, num_ranks, gpu, checked)
            needed = expected.total + sum(expected.beside.values())
            rows.append(_row(laid, stage, needed, blocks, num_parameters, tokens, num_ranks))
    taken = _taken(config, rows, free)
    chosen = config.with_ep_size(taken.ep_size)
    print(estimate(chosen, samples, num_ranks, gpu, checked))
    print("\n".join(_table(rows, taken, free, num_ranks, tokens)))


def _present_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB
    return GPU_GIB


def _row(
    config: RunConfig,
    stage: str,
    needed: int,
    blocks: list[BlockSpec],
    num_parameters: int,
    tokens: float,
    num_ranks: int,
) -> Row:
    """What the cost model says of one micro-batch."""
    of, ep_size = blocks[0], config.ep_size
    width = of.down_EDF.shape[-1]
    layer = Layer(of.routing.d_model, width, of.routing.num_experts)
    mode = "frozen" if config.model.trainable == "routers" else "trained"
    k = of.routing.top_k
    inside = ep_size <= GPUS_OF_A_HOST
    experts = sum(b.gate_up_EGD.numel() + b.down_EDF.numel() for b in blocks)
    others = num_parameters - experts
    machine = h100(2.0 * layer.d_model * layer.num_experts, inside_host=inside)
    moe = machine.seconds(layer, round(tokens), k, ep_size, mode)
    dense = 4.0 * others * tokens / (PEAK * EFFICIENCY)
    rows = len(blocks) * TRIPS[mode] * layer.bytes(round(tokens), k, ep_size) * (ep_size > 1)
    routers = sum(2 * b.gate_ED.numel() for b in blocks)  # with predictors, roughly
    mine = experts // ep_size
    trained = {"routers": routers, "experts": routers + mine, "all": others + mine}
    gradients = 8.0 * trained[config.model.trainable] * (num_ranks - 1) / num_ranks
    across = num_ranks > GPUS_OF_A_HOST
    link = (INFINIBAND if across else NVLINK) * LINK_EFFICIENCY
    seconds = len(blocks) * moe + dense + gradients / link + across * ALPHA_NETWORK
    nvlink = rows * inside + gradients * (not across)
    return Row(ep_size, stage, needed, nvlink, rows * (not inside) + gradients * across, seconds)


def _taken(config: RunConfig, rows: Sequence[Row], free: float) -> Row:
    """What the run would take: what the recipe says, or the smallest that fits."""
    stage = f"zero{config.zero_stage}"
    stage = stage if stage in _STAGES else "zero2"
    mine = [row for row in rows if row.stage == stage]
    if config.parallel.ep_size != AUTO:
        return next(row for row in mine if row.ep_size == config.ep_size)
    inside = [row for row in mine if row.ep_size <= GPUS_OF_A_HOST]
    return next((row for row in inside if row.needed <= free), inside[-1])


def _table(
    rows: Sequence[Row], taken: Row, free: float, num_ranks: int, tokens: float
) -> Iterator[str]:
    yield f"\nways to lay the run on {num_ranks} GPUs of {free / GIB:.0f} GiB, 8 a host; what one"
    yield f"sends in a micro-batch of {tokens:,.0f} tokens, and its time as a cost model of H100s"
    yield "has it (data sheets, not measured):"
    yield "  ep_size  deepspeed  memory GiB  fits  NVLink GB  network GB      ms"
    for row in rows:
        fits = "yes" if row.needed <= free else "no"
        yield (
            f"  {row.ep_size:>7}  {row.stage:<9}  {row.needed / GIB:>10.2f}  {fits:<4}  "
            f"{row.nvlink / 1e9:>9.3f}  {row.network / 1e9:>10.3f}  {1e3 * row.seconds:>6.1f}"
            f"{'  <- taken' if row == taken else ''}"
        )
    yield _why(rows, taken, free)


def _why(rows: Sequence[Row], taken: Row, free: float) -> str:
    inside = (r for r in rows if r.stage == taken.stage and r.ep_size <= GPUS_OF_A_HOST)
    auto = next((r for r in inside if r.needed <= free), None)
    if auto is None:
        way_out = "take smaller micro-batches, recomputation, or GPUs with more memory"
        return f"parallel.ep_size=auto: none inside a host fits: {way_out}"
    why = "fewer ranks that share experts exchange fewer rows, and inside a host"
    return f"parallel.ep_size=auto takes {auto.ep_size}, the smallest that fits: {why}"
