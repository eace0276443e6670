"""How much memory a rank will need at most, from shapes, before a byte of weights is read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from gemoe_ds.config import RunConfig, deepspeed_config
from gemoe_ds.data.collate import Batch, Collator, Encoded
from gemoe_ds.data.lengths import Cut, Lengths
from gemoe_ds.data.mixture import SampleList, Subset
from gemoe_ds.data.stream import batch_bytes
from gemoe_ds.engine.malloc import MOST_KERNELS
from gemoe_ds.errors import DataError, SampleError
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.blocks import BlockSpec
from gemoe_ds.models.cost.activations import StepShape, activation_bytes, at_once
from gemoe_ds.models.cost.tower_memory import tower_bytes
from gemoe_ds.models.quantised_linear import linear_maps
from gemoe_ds.moe.experts.onednn import multiplies_slowly
from gemoe_ds.moe.experts.quantised import FORMATS
from gemoe_ds.moe.router import Router
from gemoe_ds.train.assemble import collator_of, named_backbone
from gemoe_ds.train.checks.samples import Checked, check_samples
from gemoe_ds.train.checks.selection import cut_of, order_of_rows
from gemoe_ds.train.packed_step import fullest_step, mask_bytes
from gemoe_ds.train.profiling import resident_memory
from gemoe_ds.train.read_ahead import image_bytes, read_ahead

GRADIENT = MOMENT = MASTER = WEIGHT = 4  # bytes: what trains is float32
_DEFAULT_BUCKET = 5 * 10**8  # DeepSpeed's, numbers

# Of a process on CPUs, as measured (docs/memory.md): what DeepSpeed's engine, the loader's
# threads and the kernels of a first step add; and how much memory glibc's heap has in holes that
# the next tensor does not fit into, for a byte that a step needs at once, whether or not it
# recomputes.
_ENGINE = 75 * 2**20
_HELD = {"routers": 0.65, "experts": 0.65, "all": 0.35}
_HELD_ONE_BY_ONE = 0.15  # if experts are multiplied one after the other, in buffers used again

# Of oneDNN: bytes of a kernel, and for every row and column of its weight; and the numbers of rows
# in use where experts are multiplied one after the other, in rounded numbers.
_KERNEL, _KERNEL_FOR_ONE = 450_000, 700
_LENGTHS = 20
_OTHERS = 40  # of attention, the tower and the head

# Of a GPU, outside torch's allocator: as others report it, NOT measured here.
_CONTEXT = 500 * 2**20
_COMMUNICATOR = 512 * 2**20
CONTEXT, CONNECTIONS = "CUDA's context", "NCCL's buffers"


@dataclass(frozen=True)
class Estimate:
    """Peak memory of one rank in bytes, by what the bytes hold."""

    parts: dict[str, int]
    on_gpu: bool
    checkpoint: int = 0  # bytes of one on disk, of all ranks together
    common: int = 0  # the part of the total that all ranks of a host share
    hidden_size: int = 0  # of the language model
    beside: dict[str, int] = field(default_factory=dict)  # on a GPU, and not torch's
    largest_batch: int = 0  # bytes of a micro-batch as it is read
    read_ahead: int = 0  # bytes of those that are made before their step, in host memory

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        place = "GPU memory that torch allocates" if self.on_gpu else "host memory of the process"
        title = f"estimate for one rank: {self.total / 2**30:.2f} GiB of {place}"
        parts = ((name, size / 2**30) for name, size in self.parts.items() if size)
        lines = [title, *(f"  {name:<32} {size:8.3f}" for name, size in parts)]
        if self.beside:
            held = ", ".join(f"{name} {n / 2**30:.2f}" for name, n in self.beside.items() if n)
            lines.append(f"and beside it on the GPU, roughly: {held}")
        if self.on_gpu:
            lines.append(
                f"and in host memory, for micro-batches read ahead: {self.read_ahead / 2**30:.2f} "
                "GiB (data.prefetch_bytes)"
            )
        return "\n".join(lines)

    def against(self, measured: int) -> str:
        return (
            f"memory of the fullest rank: {measured / 2**30:.2f} GiB; {self.total / 2**30:.2f} "
            "were estimated, for the longest samples; both are of loading and a training step"
        )


def estimate(
    config: RunConfig,
    samples: SampleList,
    num_ranks: int,
    device: torch.device,
    checked: Checked | None = None,
) -> Estimate:
    """For a run on so many ranks. Reads headers, a tokenizer, and the longest samples."""
    backbone = named_backbone(config)
    checkpoint = Path(config.model.checkpoint) if config.model.checkpoint else None
    hf = backbone.load(checkpoint, Path(config.data.tokenizer))
    blocks = backbone.moe_blocks(hf)
    chosen = Router.named(config.model.router.name)
    routers = [chosen(config.model.router.config, block.routing) for block in blocks]
    process = resident_memory()  # before images are looked at
    collator = collator_of(config, backbone, hf)
    checked = checked or check_samples(config, samples, collator, num_ranks=num_ranks)
    assert checked is not None and checked.lengths is not None, "this is the first rank"
    samples, lengths = _trained_on(samples, checked)
    on_gpu = device.type == "cuda"
    shape, seen, largest = _largest_step(config, samples, collator, lengths, routers, on_gpu)
    dtype = getattr(torch, config.model.dtype)
    masks = 0
    if config.data.pack:
        order = order_of_rows(config, checked.selection, num_ranks)
        shape, seen, largest = fullest_step(config, samples, collator, lengths, order, shape)
        masks = mask_bytes(config)
    if seen.images:
        shape = _with_images(shape, backbone, hf, blocks, seen, dtype)
    weights = _weights(config, hf, blocks, routers, dtype, num_ranks, shape.on_gpu)
    step = activation_bytes(backbone, hf, blocks, shape)
    parts = weights | step | {"masks of packed rows": masks}
    image_N = cut_of(lengths, config).image_N
    ahead = read_ahead(config, samples, collator, seen, image_N, num_ranks)
    if not shape.on_gpu:
        parts = {"Python and its packages": process + _ENGINE} | parts
        if seen.images:
            parts["images read ahead"] = ahead
        packs = shape.is_cast and not multiplies_slowly(device, torch.bfloat16)
        if config.model.pack_experts and config.model.trainable == "routers" and packs:
            # for the forward pass, and for the backward pass of all above the first router
            experts = [b.gate_up_EGD.numel() + b.down_EDF.numel() for b in [*blocks, *blocks[1:]]]
            parts["packed experts"] = sum(experts) // shape.ep_size * shape.itemsize
        if shape.is_cast:
            parts["kernels that oneDNN keeps"] = _kernels(blocks, shape)
        if config.zero_stage:
            parts["left behind by DeepSpeed"] = weights["weights that train"]
        stored = activation_bytes(backbone, hf, blocks, shape.without_checkpointing)
        held = _HELD[config.model.trainable] if at_once(blocks[0], shape) else _HELD_ONE_BY_ONE
        parts["free, but held by the C library"] = round(held * sum(stored.values()))
    return Estimate(
        parts,
        shape.on_gpu,
        _checkpoint(config, hf, blocks, routers),
        0 if shape.on_gpu else _common(config, hf, blocks, dtype),
        blocks[0].routing.d_model,
        _beside(config, num_ranks) if shape.on_gpu else {},
        largest,
        ahead,
    )


def _trained_on(samples: SampleList, checked: Checked) -> tuple[SampleList, Lengths]:
    """What is taken of the samples, and its lengths."""
    assert checked.lengths is not None
    row_M = checked.selection.row_M
    if row_M is None:
        return samples, checked.lengths
    return Subset(samples, row_M, str(samples.path)), checked.lengths.of_rows(row_M)


def _beside(config: RunConfig, num_ranks: int) -> dict[str, int]:
    """A communicator for all ranks, for those that share experts, and for those with equal ones."""
    ep_size = config.ep_size
    groups = (num_ranks > 1) + (ep_size > 1)
    groups += config.model.trainable != "routers" and 1 < ep_size < num_ranks
    return {CONTEXT: _CONTEXT, CONNECTIONS: groups * _COMMUNICATOR}


def _largest_step(
    config: RunConfig,
    samples: SampleList,
    collator: Collator,
    lengths: Lengths,
    routers: list[Router],
    on_gpu: bool,
) -> tuple[StepShape, Batch, int]:
    """A step of the longest samples, without images; the micro-batch with most of those; bytes of
    the larger one of the two as they are read."""
    cut, size = cut_of(lengths, config), config.train.micro_batch_size
    longest = _largest(samples, collator, size, cut.length_N)
    seen = _largest(samples, collator, size, cut.image_N)
    shape = StepShape(
        tokens=longest.input_ids_BS.numel(),
        targets=_most(cut.targets_N, size),
        distilled=_distilled(config, cut),
        itemsize=getattr(torch, config.model.dtype).itemsize,
        k=max(router.peak_mean_k for router in routers),
        ep_size=config.ep_size,
        train=config.model.trainable,
        activation_checkpointing=config.model.activation_checkpointing,
        on_gpu=on_gpu,
        quantised=config.model.experts_dtype is not None,
    )
    return shape, seen, max(batch_bytes(longest), batch_bytes(seen))


def _most(count_N: np.ndarray, size: int) -> int:
    """Of a micro-batch of the samples that have most."""
    return int(np.sort(count_N)[-size:].sum())


def _distilled(config: RunConfig, cut: Cut) -> int:
    """The most positions of a micro-batch at which a teacher is listened to."""
    if config.train.distill is None:
        return 0
    count_N = {
        "answers": cut.targets_N,
        "text": cut.length_N - cut.image_N,
        "all": cut.length_N,
    }[config.train.distill.tokens]
    return _most(count_N, config.train.micro_batch_size)


def _with_images(
    shape: StepShape,
    backbone: Backbone,
    hf: nn.Module,
    blocks: list[BlockSpec],
    batch: Batch,
    dtype: torch.dtype,
) -> StepShape:
    """Of the micro-batch with the largest images; a GPU holds the batch itself, too."""
    most, kept = tower_bytes(
        backbone,
        hf,
        hf.get_submodule(blocks[0].path.partition(".layers.")[0]),
        batch.model_inputs,
        dtype,
        trains=shape.train == "all",
        activation_checkpointing=shape.activation_checkpointing,
    )
    there = image_bytes(batch) if shape.on_gpu else 0
    return replace(shape, images_at_most=most + there, images_kept=kept + there)


def _common(config: RunConfig, hf: nn.Module, blocks: list[BlockSpec], dtype: torch.dtype) -> int:
    """What stays in the memory of a host for all its ranks: see engine/host_memory.py."""
    if config.model.trainable == "all" or config.zero_stage == 3:
        return 0
    ours = {id(p) for b in blocks for p in (b.gate_ED, b.gate_up_EGD, b.down_EDF)}
    ours |= {id(one.weight) for one in _dense_in_few_bits(config, hf, blocks)}
    rest = (p for p in hf.parameters() if p.is_meta and id(p) not in ours)
    return sum(p.numel() for p in rest) * dtype.itemsize


def _weights(
    config: RunConfig,
    hf: nn.Module,
    blocks: list[BlockSpec],
    routers: list[Router],
    dtype: torch.dtype,
    num_ranks: int,
    on_gpu: bool,
) -> dict[str, int]:
    """Weights by how they are held, and what trains beside them."""
    stage, ep_size = config.zero_stage, config.ep_size
    experts = sum(b.gate_up_EGD.numel() + b.down_EDF.numel() for b in blocks) // ep_size
    gates = sum(b.gate_ED.numel() for b in blocks)
    rest = sum(p.numel() for p in hf.parameters()) - experts * ep_size - gates
    of_routers = [p for router in routers for p in router.parameters()]
    others = sum(p.numel() for p in of_routers if p.requires_grad)
    whole, few_bits = _frozen_rest(config, hf, blocks, rest, dtype)
    # ZeRO 3 divides what is whole; neither what is in few bits nor frozen experts
    frozen = whole // (num_ranks if stage == 3 else 1) + few_bits
    if config.model.trainable == "routers":
        kept = _frozen_experts(config, blocks, dtype) // ep_size
        experts, frozen = 0, frozen + kept + gates * WEIGHT  # as they were
    elif config.model.trainable == "all":
        others, frozen = others + rest, 0
    trained = experts + others

    def held(size: int, *, is_divided: bool) -> int:
        """Bytes of what trains. ZeRO divides a shard of the experts among the ranks that have the
        same one, the rest among all: that is an equal part of everything for each."""
        return (experts * ep_size + others) * size // num_ranks if is_divided else trained * size

    states = 2 * MOMENT + (MASTER if stage else 0)
    return {
        "frozen weights": frozen,
        "weights that train": held(WEIGHT, is_divided=stage == 3),
        "their gradients": held(GRADIENT, is_divided=stage >= 2),
        "their optimizer states": held(states, is_divided=stage >= 1),
        "copy for the first step's check": trained * WEIGHT,
        "buckets of gradients": _buckets(
            config, num_ranks, blocks[0].routing.d_model, trained, on_gpu
        ),
    }


def _frozen_rest(
    config: RunConfig, hf: nn.Module, blocks: list[BlockSpec], numbers: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes of what is in `dtype` and of what is in few bits, of so many numbers."""
    maps = _dense_in_few_bits(config, hf, blocks)
    in_few = sum(one.weight.numel() for one in maps)
    size = 0
    if config.model.dense_dtype is not None:
        kept = FORMATS[config.model.dense_dtype]
        size = sum(kept.num_bytes(one.out_features, one.in_features) for one in maps)
    return (numbers - in_few) * dtype.itemsize, size


def _dense_in_few_bits(
    config: RunConfig, hf: nn.Module, blocks: list[BlockSpec]
) -> list[nn.Linear]:
    if config.model.dense_dtype is None:
        return []
    return [*linear_maps(hf, [block.gate_ED for block in blocks]).values()]


def _frozen_experts(config: RunConfig, blocks: list[BlockSpec], dtype: torch.dtype) -> int:
    """Bytes of all of them."""
    weights = [one for b in blocks for one in (b.gate_up_EGD, b.down_EDF)]
    if config.model.experts_dtype is None:
        return sum(one.numel() for one in weights) * dtype.itemsize
    kept = FORMATS[config.model.experts_dtype]
    return sum(kept.num_bytes(one.shape[0] * one.shape[1], one.shape[2]) for one in weights)


def _kernels(blocks: list[BlockSpec], shape: StepShape) -> int:
    """Of the four products of every expert, whose numbers of rows differ, and of all others."""
    counts = sum(block.routing.num_experts for block in blocks) // shape.ep_size
    if not at_once(blocks[0], shape):
        counts = min(counts, _LENGTHS)
    size = _KERNEL + _KERNEL_FOR_ONE * (blocks[0].routing.d_model + blocks[0].down_EDF.shape[-1])
    return min(4 * counts + _OTHERS, MOST_KERNELS) * size


def _checkpoint(
    config: RunConfig, hf: nn.Module, blocks: list[BlockSpec], routers: list[Router]
) -> int:
    """What trains and the routers, with moments (frozen router tensors have none, and are few)."""
    trained = sum(p.numel() for r in routers for p in r.parameters())
    if config.model.trainable == "experts":
        trained += sum(b.gate_up_EGD.numel() + b.down_EDF.numel() for b in blocks)
    elif config.model.trainable == "all":
        trained += sum(p.numel() for p in hf.parameters())
    return trained * (WEIGHT + 2 * MOMENT)


def _buckets(
    config: RunConfig, num_ranks: int, hidden_size: int, trained: int, on_gpu: bool
) -> int:
    """ZeRO 1 and 2 hold a bucket whatever there is to put into it, ZeRO 3 what is in it.

    On a CPU memory that nobody writes to costs nothing, so that there it is what trains at most.
    """
    stage = config.zero_stage
    if stage == 0:
        return 0
    options = deepspeed_config(config, num_ranks, hidden_size).get("zero_optimization", {})
    size = options.get("reduce_bucket_size", _DEFAULT_BUCKET)
    if stage == 3 or not on_gpu:
        size = min(size, trained)
    copies = 2 if options.get("overlap_comm", stage == 3) else 1
    return size * GRADIENT * copies


def _largest(samples: SampleList, collator: Collator, size: int, most_N: np.ndarray) -> Batch:
    """A micro-batch of the samples that have most."""
    largest: list[Encoded] = []
    reason = ""
    for row in np.argsort(-most_N, kind="stable").tolist():
        try:
            largest.append(collator.encode(row, samples[row]))
        except SampleError as error:  # an image of which the header alone is whole
            reason = reason or str(error)
        if len(largest) == size:
            break
    if not largest:
        raise DataError(f"{samples.path}: none of {len(samples):,} samples can be used: {reason}")
    return collator.batch(largest)
