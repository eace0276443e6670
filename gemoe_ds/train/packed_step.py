"""The largest step of a run whose rows hold several samples, for the estimate of memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from gemoe_ds.config import RunConfig
from gemoe_ds.data.collate import Batch, Collator, Encoded
from gemoe_ds.data.lengths import Lengths
from gemoe_ds.data.mixture import SampleList
from gemoe_ds.data.pack import PackedOrder, joined
from gemoe_ds.data.stream import batch_bytes
from gemoe_ds.models.cost.activations import StepShape
from gemoe_ds.train.checks.selection import cut_of


def fullest_step(
    config: RunConfig,
    samples: SampleList,
    collator: Collator,
    lengths: Lengths,
    order: PackedOrder,
    shape: StepShape,
) -> tuple[StepShape, Batch, int]:
    """Full rows, with as many targets, and positions that are distilled, as the rows of the first
    epoch that have most; a micro-batch of its fullest rows, and its bytes.

    `shape`: of the samples one by one. `lengths`: of the samples that are taken.
    """
    cut, plan, size = cut_of(lengths, config), order.plan(0), config.train.micro_batch_size
    start_R = np.concatenate([[0], plan.end_R[:-1]])
    targets_R = np.add.reduceat(cut.targets_N[plan.sample_P], start_R)
    tokens = size * config.data.max_length
    targets = int(np.sort(targets_R)[-size:].sum())
    distill = config.train.distill
    distilled = 0 if distill is None else targets if distill.tokens == "answers" else tokens
    fullest = np.argsort(-order.lengths, kind="stable")[:size].tolist()
    batch = collator.batch(
        [joined([_encoded(collator, samples, i) for i in plan[row].tolist()]) for row in fullest]
    )
    step = replace(shape, tokens=tokens, targets=targets, distilled=distilled)
    return step, batch, batch_bytes(batch)


def mask_bytes(config: RunConfig) -> int:
    """A row attends by a mask of its own, which PyTorch's attention makes numbers of."""
    itemsize = getattr(torch, config.model.dtype).itemsize
    return int(config.train.micro_batch_size * config.data.max_length**2 * (1 + itemsize))


def _encoded(collator: Collator, samples: SampleList, index: int) -> Encoded:
    return collator.encode_or_leave_out(index, samples[index])
