"""What only the loaded model can say of its weights: its loss as published, on the user's samples.

Shapes cannot tell a gate projection from an up projection, nor a square matrix from its transpose:
a folder that has them exchanged loads, trains, and is worthless. A model that knows language is
far better than guessing; one whose parts are exchanged is not, and gets better if it is set right.

Shapes: E experts held here, G = 2 F (gate rows, then up rows), D model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from gemoe_ds.config import RunConfig
from gemoe_ds.data.collate import Batch
from gemoe_ds.data.mixture import SampleList
from gemoe_ds.engine.world import World, sum_over_ranks
from gemoe_ds.errors import CheckpointError
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.models.kv_cache import DecodeState
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.router import Router
from gemoe_ds.train.assemble import build_collator

_SAMPLES = 8  # over all ranks; at least one on each
_KNOWS = 0.75  # of the loss of guessing: a model that has learned anything is below
_CLEARLY = 0.8  # of the other loss: both guess alike where there is nothing to know


def base_loss_check(
    model: MoEModel, config: RunConfig, samples: SampleList, world: World
) -> Iterator[str]:
    """One line for each point, before the model is in an engine or resumed. Collective.

    Raises CheckpointError if gate and up are exchanged, or if the loss is no number.
    """
    model.to(world.device)
    batches = list(_first(model, config, samples, world))
    with unmodified(model), torch.no_grad():
        own = _loss(model, batches, world)
        if own is None:
            yield "unmodified model: no loss to look at, as none of the first samples can be used"
            return
        vocabulary = _vocabulary(model)
        guessing = math.log(vocabulary)
        if not math.isfinite(own):
            raise CheckpointError(
                f"model.checkpoint={config.model.checkpoint}: the loss of the unmodified model on "
                f"the first samples is {own}; model.dtype may be too narrow for its weights"
            )
        with gate_and_up_exchanged(model):
            exchanged = _loss(model, batches, world)
            assert exchanged is not None, "as many targets as before"
        result = "it knows these texts"
        if own > _KNOWS * guessing:
            result = (
                "differs: little better than guessing; random weights, parts of them exchanged, or "
                "another model's tokenizer or chat template"
            )
        yield (
            f"unmodified model, k = {model.routing[0].top_k}: loss {own:.3f} a token on the first "
            f"samples; guessing would be ln({vocabulary:,}) = {guessing:.2f}: {result}"
        )
        if exchanged < min(_CLEARLY * own, _KNOWS * guessing):
            raise CheckpointError(
                f"model.checkpoint={config.model.checkpoint}: gate and up projections stand under "
                f"each other's names: the loss is {own:.3f}, and {exchanged:.3f} with all of them "
                "exchanged; rename the keys (gate_proj and up_proj, or the halves of gate_up_proj)"
            )
        told = own < _CLEARLY * exchanged
        result = "they are in their places" if told else "too close to tell"
        yield f"gate and up exchanged: the loss would be {exchanged:.3f}: {result}"
        yield from _golden(model)


@contextmanager
def unmodified(model: MoEModel) -> Iterator[None]:
    """The backbone's own routing by its own gates, of a model that has not been trained yet."""
    top_k, routers = Router.named("top_k"), [layer.router for layer in model.moe_layers]
    training = model.training
    for layer, routing in zip(model.moe_layers, model.routing, strict=True):
        static = top_k(top_k.Config(), routing)
        static.adopt_gate(layer.router.gate.weight)
        layer.router = static.to(layer.router.gate.weight.device)
    model.eval()
    try:
        yield
    finally:
        for layer, router in zip(model.moe_layers, routers, strict=True):
            layer.router = router
        model.train(training)


@contextmanager
def gate_and_up_exchanged(model: MoEModel) -> Iterator[None]:
    """In every expert, in place; what a CPU holds packed is laid aside."""
    experts = [layer.experts for layer in model.moe_layers]
    packs = [some.pack for some in experts]
    for some in experts:
        some.pack = False
        _exchange(some)
    try:
        yield
    finally:
        for some, pack in zip(experts, packs, strict=True):
            _exchange(some)
            some.pack = pack


@torch.no_grad()
def _exchange(experts: Experts) -> None:
    for tensor_EG in experts.gate_up_tensors:
        for rows_G in tensor_EG:
            gate_F, up_F = rows_G.chunk(2)
            kept_F = gate_F.clone()
            gate_F.copy_(up_F)
            up_F.copy_(kept_F)


def _first(
    model: MoEModel, config: RunConfig, samples: SampleList, world: World
) -> Iterator[Batch]:
    """This rank's of the first samples, one by one; as many on every rank, broken ones empty."""
    collator = build_collator(config, model)
    for number in range(-(-min(_SAMPLES, len(samples)) // world.size)):
        row = (number * world.size + world.rank) % len(samples)
        yield collator.batch([collator.encode_or_leave_out(row, samples[row])])


def _loss(model: MoEModel, batches: Sequence[Batch], world: World) -> float | None:
    """Mean over all targets of all ranks; None if there are none."""
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for batch in batches:
        lm = model(**batch.to(world.device).inputs, targets_per_micro_batch=1.0)["lm"]
        total += torch.stack([lm.double(), lm.new_tensor(batch.num_targets).double()])
    sum_over_ranks(total)
    loss, targets = total.tolist()
    return float(loss / targets) if targets else None


def _vocabulary(model: MoEModel) -> int:
    head = model.backbone.head(model.hf)
    return next(m.out_features for m in head.modules() if isinstance(m, nn.Linear))


def _golden(model: MoEModel) -> Iterator[str]:
    """What the public model is known to write, if this can be it."""
    golden = model.backbone.golden
    is_public = model.num_parameters == model.backbone.published_parameters
    if golden is None or not is_public or _vocabulary(model) != golden.vocabulary:
        return
    past, found = DecodeState(), []
    next_BS = torch.tensor([golden.prompt], device=next(model.parameters()).device)
    for _ in golden.continuation:
        valid_BS = torch.ones_like(next_BS, dtype=torch.bool)
        logits_BV = model.next_logits(ModelInputs(next_BS, valid_BS, ~valid_BS, past=past))
        next_BS = logits_BV.argmax(-1, keepdim=True)
        found.append(int(next_BS))
    result = f"as {golden.model} does"
    if found != list(golden.continuation):
        result = f"differs: {golden.model} writes {list(golden.continuation)}"
    yield f"after the token ids {list(golden.prompt)} it writes {found}: {result}"
