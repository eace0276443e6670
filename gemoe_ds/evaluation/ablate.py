"""Leave one expert out of one token's mixture, and see what the loss of its sample becomes.

Shapes: B sequences of S tokens, T = B S, L MoE layers, E experts (N columns with free ones),
D model; P pairs of a token and one of its experts.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gemoe_ds.analysis.ablation import Ablation, Pairs, as_text, summary, write_ablation
from gemoe_ds.analysis.provenance import provenance
from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.cluster.watchdog import watched
from gemoe_ds.data.bad_samples import BadSample
from gemoe_ds.data.collate import IGNORE, Batch
from gemoe_ds.data.sample import SampleFolder, open_samples
from gemoe_ds.engine.world import distributed, gather_objects
from gemoe_ds.errors import ConfigError, DataError
from gemoe_ds.evaluation.arguments import RoutingMode, modes
from gemoe_ds.evaluation.records import method_name
from gemoe_ds.evaluation.session import EvalSession, chosen_routers, session_config
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.moe.layer import MoELayer
from gemoe_ds.moe.losses import entropy_bits
from gemoe_ds.moe.plan import RoutingPlan
from gemoe_ds.moe.router import Decision, Router
from gemoe_ds.progress import EVALUATE


def ablate_all(arguments: Namespace, stop: StopRequest | None) -> None:
    """The pairs of the samples with every routing; a table and two files each. Collective."""
    config = session_config(arguments)
    if config.ep_size > 1:
        raise ConfigError("gemoe ablate has all experts on every rank: leave parallel.ep_size out")
    samples, asked = open_samples(arguments.data), modes(arguments, chosen_routers(arguments))
    with distributed() as world, watched(world, config.monitor.stall_seconds):
        session = EvalSession(arguments, config, world, stop)
        for mode in asked:
            out = arguments.out / (mode.folder if len(asked) > 1 or mode.mean_k else "")
            session.set_routing(mode)
            session.say(f"leaving experts out: {mode}")
            pairs, loss = _measured(session, samples)
            if world.is_first:
                _write(session, mode, out, pairs, loss)
            gather_objects(None)


def _measured(session: EvalSession, samples: SampleFolder) -> tuple[Pairs, float]:
    """The pairs of all ranks, and the mean loss of a sample. Collective."""
    arguments, world = session.arguments, session.world
    parts: list[Pairs] = []
    bad: list[BadSample] = []
    losses: list[float] = []
    stream = session.stream(samples, limit=arguments.limit)
    for batch in session.iterate(stream, EVALUATE):
        if batch is None:
            continue
        bad += batch.bad
        pairs, loss_B = ablate(
            session.model, batch.to(world.device), arguments.pairs, session.config.seed
        )
        parts.append(pairs)
        losses += loss_B[batch.is_valid_BS.any(1)].tolist()
    log = session.bad_sample_log(samples)
    log.record(bad)
    log.check()
    ranks = gather_objects((parts, losses))
    everything = Pairs.joined([pairs for of_rank, _ in ranks for pairs in of_rank])
    if not everything.cost_P.size:
        raise DataError(
            f"{samples.path}: no token before a target has an expert that could be left out; give "
            "other samples, or a routing with more experts"
        )
    return everything, float(np.mean([loss for _, of_rank in ranks for loss in of_rank]))


def _write(session: EvalSession, mode: RoutingMode, out: Path, pairs: Pairs, loss: float) -> None:
    ablation = Ablation(
        method=method_name(session, mode),
        k=session.model.moe_layers[0].router.static_k,
        budget_k=mode.mean_k,
        seed=session.config.seed,
        loss=loss,
        checkpoint=str(session.checkpoint or session.config.model.checkpoint),
        **summary(pairs, len(session.model.moe_layers)),
        **provenance(),
    )
    write_ablation(out, ablation, pairs)
    print(f"{out}:\n{as_text(ablation)}", end="")


@dataclass
class _Seen:
    """A layer in the forward that keeps its gradients."""

    layer: MoELayer
    x_TD: Tensor = field(init=False)
    y: Tensor = field(init=False)  # [..., D], in the graph
    decision: Decision = field(init=False)


@dataclass
class _Drawn:
    """Pairs of a batch; `turn` counts those of a sequence."""

    sequence_P: Tensor
    turn_P: Tensor
    layer_P: Tensor
    token_P: Tensor  # of T
    expert_P: Tensor

    def where(self, of_P: Tensor) -> _Drawn:
        return _Drawn(**{name: tensor[of_P] for name, tensor in vars(self).items()})


def ablate(model: MoEModel, batch: Batch, num_pairs: int, seed: int) -> tuple[Pairs, Tensor]:
    """`num_pairs` of every sequence, drawn at random, and the loss of each sequence, [B].

    One forward leaves out a pair of each sequence, which do not see each other. Where the loss has
    no gradient a pair costs nothing, and none is drawn: behind the last target, and of the last
    layer's tokens those that predict none. The draw is the same in any batch and on any rank.
    """
    model.eval()
    labels_BS = batch.labels_BS
    # 1. One pass with gradients: what was routed, and what the loss says of every layer's output.
    with _observing(model) as seen, _forgetting(model):
        grads = torch.autograd.grad(losses(model, batch).sum(), [one.y for one in seen])
    # 2. The pairs.
    matters_LT = torch.stack([(grad != 0).any(-1).flatten() for grad in grads])
    mask_LTE = torch.stack([one.layer.router.split(one.decision.mask_TE)[0] for one in seen])
    drawn = _draw(mask_LTE & matters_LT[..., None], batch.rows, num_pairs, seed)
    # 3. What foretells their cost, and the cost.
    foretold = _foretold(seen, grads, drawn)
    loss_B, cost_P = _costs(model, batch, drawn)
    token_P = drawn.token_P.cpu().numpy()
    pairs = Pairs(
        sample_P=np.array(batch.rows, np.int32)[drawn.sequence_P.cpu().numpy()],
        position_P=(token_P % labels_BS.shape[1]).astype(np.int32),
        is_vision_P=batch.is_vision_BS.flatten().cpu().numpy()[token_P],
        layer_P=drawn.layer_P.cpu().numpy().astype(np.int16),
        expert_P=drawn.expert_P.cpu().numpy().astype(np.int16),
        rank_P=foretold.pop("rank_P").cpu().numpy().astype(np.int16),
        cost_P=cost_P.float().cpu().numpy(),
        **{name: tensor.float().cpu().numpy() for name, tensor in foretold.items()},
    )
    return pairs, loss_B


def losses(model: MoEModel, batch: Batch) -> Tensor:
    """Sum of the cross-entropies of each sequence, [B]."""
    logits, targets = model.target_logits(batch.model_inputs, batch.labels_BS)
    ce = cross_entropy(logits.float(), targets, reduction="none").double()
    sequence = (batch.labels_BS[:, 1:] != IGNORE).nonzero()[:, 0]
    return ce.new_zeros(len(batch.rows)).index_add(0, sequence, ce)


@contextmanager
def _forgetting(model: MoEModel) -> Iterator[None]:
    """A forward leaves nothing behind for routers that follow what they see."""
    before = {name: tensor.clone() for name, tensor in model.ctx.memory.items()}
    try:
        yield
    finally:
        model.ctx.memory = before


@contextmanager
def _observing(model: MoEModel) -> Iterator[list[_Seen]]:
    """What goes through every layer, while this lasts."""
    seen = [_Seen(layer) for layer in model.moe_layers]

    def route(slot: int, decision: Decision) -> Decision:
        seen[slot].decision = decision
        return decision

    def output(layer: MoELayer, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        slot = layer.router.spec.slot
        seen[slot].x_TD = args[0].detach().reshape(-1, y.shape[-1])
        seen[slot].y = y if y.requires_grad else y.requires_grad_()
        return seen[slot].y

    hooks = [one.layer.register_forward_hook(output) for one in seen]
    model.ctx.intervene = route
    try:
        yield seen
    finally:
        model.ctx.intervene = None
        for hook in hooks:
            hook.remove()


def _draw(mask_LTE: Tensor, rows: tuple[int, ...], num_pairs: int, seed: int) -> _Drawn:
    """Of each sequence, whose row in the data is given, as many of the chosen experts, or all."""
    length = mask_LTE.shape[1] // len(rows)
    found = []
    for sequence, row in enumerate(rows):
        first = sequence * length
        chosen_C3 = mask_LTE[:, first : first + length].nonzero()
        number = min(num_pairs, len(chosen_C3))
        drawn = np.random.default_rng([seed, row]).choice(len(chosen_C3), number, replace=False)
        layer_P, token_P, expert_P = chosen_C3[torch.from_numpy(drawn).to(mask_LTE.device)].unbind(
            1
        )
        turn_P = torch.arange(number, device=mask_LTE.device)
        found.append(
            (torch.full_like(turn_P, sequence), turn_P, layer_P, token_P + first, expert_P)
        )
    return _Drawn(*(torch.cat(columns) for columns in zip(*found, strict=True)))


def leave_out(
    decision: Decision, token_P: Tensor, expert_P: Tensor, *, norm_topk_prob: bool
) -> Decision:
    """The decision without these experts, one of each token; where weights are divided by their
    sum, those of the experts that remain have the sum that all had."""
    mask_TN = decision.mask_TE.clone()
    mask_TN[token_P, expert_P] = False
    weights_TN = torch.where(decision.mask_TE, decision.weights_TE, 0)
    if norm_topk_prob:
        whole_P = weights_TN[token_P].sum(1)
        left_P = torch.where(mask_TN, weights_TN, 0)[token_P].sum(1)
        factor_P = whole_P / left_P.clamp_min(torch.finfo(left_P.dtype).tiny)
        weights_TN = weights_TN.index_put((token_P,), weights_TN[token_P] * factor_P[:, None])
    return replace(decision, mask_TE=mask_TN, weights_TE=weights_TN)


def _normalises(router: Router) -> bool:
    how = getattr(router.config, "norm_topk_prob", "none")
    return how == "sum" or (how == "backbone" and router.spec.norm_topk_prob)


@torch.no_grad()
def _foretold(seen: list[_Seen], grads: Sequence[Tensor], drawn: _Drawn) -> dict[str, Tensor]:
    """What is known of the pairs without leaving them out, by the names of `Pairs`."""
    values: dict[str, Tensor] = {}
    for slot, (one, grad) in enumerate(zip(seen, grads, strict=True)):
        here_P = drawn.layer_P == slot
        pairs = drawn.where(here_P)
        of_layer = _foretold_in(one, grad.reshape(-1, grad.shape[-1])[pairs.token_P], pairs)
        for name, found in of_layer.items():
            values.setdefault(name, found.new_zeros(len(here_P)))[here_P] = found
    return values


def _foretold_in(one: _Seen, grad_PD: Tensor, pairs: _Drawn) -> dict[str, Tensor]:
    """In one layer. Each pair is a row: a token may have several."""
    router, x_PD = one.layer.router, one.x_TD[pairs.token_P]
    own_P = torch.arange(len(x_PD), device=x_PD.device)
    whole = Decision(
        one.decision.scores_TE[pairs.token_P].float(),
        one.decision.mask_TE[pairs.token_P],
        one.decision.weights_TE[pairs.token_P],
    )
    without = leave_out(whole, own_P, pairs.expert_P, norm_topk_prob=_normalises(router))

    def mixed(decision: Decision) -> Tensor:
        y_PD: Tensor = one.layer.experts(x_PD, router.plan(decision)).float()
        free_PD = router.free_output(x_PD, decision)
        return y_PD if free_PD is None else y_PD + free_PD

    routed_PE, _ = router.split(whole.scores_TE)
    alone_PE = torch.zeros_like(routed_PE, dtype=torch.bool)
    alone_PE[own_P, pairs.expert_P] = True
    alone = RoutingPlan.from_mask(alone_PE, torch.ones_like(routed_PE))
    score_P = routed_PE[own_P, pairs.expert_P]
    is_better_PE = routed_PE > score_P[:, None]
    return {
        "rank_P": is_better_PE.sum(1).float() + 1,
        "score_P": score_P,
        "best_score_P": routed_PE.amax(1),
        "better_P": (routed_PE * is_better_PE).sum(1),
        "entropy_P": entropy_bits(whole.scores_TE),
        "norm_P": one.layer.experts(x_PD, alone).float().norm(dim=1),
        "first_order_P": (grad_PD.float() * (mixed(without) - mixed(whole))).sum(1),
    }


@torch.no_grad()
def _costs(model: MoEModel, batch: Batch, drawn: _Drawn) -> tuple[Tensor, Tensor]:
    """Loss of each sequence, [B], and how much larger it is without each pair, [P]; float64."""

    def loss_B() -> Tensor:
        with _forgetting(model):
            return losses(model, batch)

    whole_B = loss_B()
    cost_P = whole_B.new_zeros(len(drawn.turn_P))
    for turn in drawn.turn_P.unique():
        here_P = drawn.turn_P == turn
        now = drawn.where(here_P)

        def without(slot: int, decision: Decision, now: _Drawn = now) -> Decision:
            pairs = now.where(now.layer_P == slot)
            norm_topk_prob = _normalises(model.moe_layers[slot].router)
            return leave_out(decision, pairs.token_P, pairs.expert_P, norm_topk_prob=norm_topk_prob)

        model.ctx.intervene = without
        try:
            cost_P[here_P] = (loss_B() - whole_B)[now.sequence_P]
        finally:
            model.ctx.intervene = None
    return whole_B.cpu(), cost_P
