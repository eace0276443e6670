"""Router: score -> select -> losses, in that order; a routing method fills in the steps.

Words: *logits* are raw, *scores* come after the softmax, *mask* says which experts were chosen,
*weights* combine their outputs. Shapes: T tokens, D model, E experts, M free experts, N = E + M.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe import losses
from gemoe_ds.moe.context import LayerRecord, LossTerm, Stat, TokenContext
from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.experts.zero_computation import ZeroComputationExperts, ZeroComputationKind
from gemoe_ds.moe.linear import RouterLinear, fused_linear, without_autocast
from gemoe_ds.moe.loss_groups import losses_by_group
from gemoe_ds.moe.per_layer import of_layer
from gemoe_ds.moe.plan import RoutingPlan
from gemoe_ds.moe.step_context import Read, StepContext
from gemoe_ds.registry import ConfigModel, Registered


@dataclass(frozen=True)
class RoutingSpec:
    """What a backbone says about the routing of one of its MoE layers."""

    d_model: int
    num_experts: int
    top_k: int  # the backbone's own k
    norm_topk_prob: bool  # divide the chosen scores by their sum (norm_topk_prob)
    slot: int = 0  # which of the model's MoE layers, counted from the first
    routed_scaling_factor: float = 1.0  # of the weights, when they have been chosen
    num_layers: int | None = None  # how many MoE layers the model has, where that is known


@dataclass(frozen=True)
class Decision:
    """The outcome of `select`: E columns, after them one for each free expert if there are any.

    Routers subclass it to hand more to their own `losses`.
    """

    scores_TE: Tensor  # float32
    mask_TE: Tensor  # bool
    weights_TE: Tensor  # float32; read only where the mask is true


class Router(Registered, nn.Module):
    """Base of the routing methods: subclasses override the steps, nobody what calls them.

    A subclass sets `name`, nests its options as `Config` (pydantic), and overrides what differs:
    `score` -> logits, `select` -> a `Decision`, `losses`, `after_step`. CONTRIBUTING.md has one in
    full. It is made of its options and a `RoutingSpec`.

    Padding is 0 in what the steps are given (`TokenContext.without_padding`), so that
    `* ctx.is_valid_T` leaves it out of a sum.

    Every parameter belongs to a module that is CALLED in every forward, with no tokens too: ZeRO 3
    gathers weights module by module, all ranks in the same order. Buffers that persist are the
    router's state: equal on all ranks, in every checkpoint.
    """

    updates_per_batch = 1  # optimizer steps on the same samples
    static_k: int | None = None  # the k of every token, for methods in which it is constant
    added: ClassVar[Mapping[str, Any]] = {}  # options of later versions: what older runs had
    # The one number that moves the mean k after training: the name of a `PerLayer` option, and of
    # the attribute that holds this layer's value of it. None: the method has none.
    dial: ClassVar[str | None] = None
    # Whether the dial is a layer's mean k, and a budget is shared out by what layers lose by it.
    budgets_by_sensitivity: ClassVar[bool] = False
    # Whether the weight of an expert that is not chosen is a function of its score: else there is
    # nothing that its gradient (`model.gate_gradient: dense`) could reach.
    weighs_all: ClassVar[bool] = True
    # Whether it trains the experts alone, and has nothing of its own that would.
    trains_experts: ClassVar[bool] = False
    # Its losses that depend on which samples share them, each with the options that turn it off if
    # they are 0 or null; "": none does. None: nobody has said, so they all may.
    batch_losses: ClassVar[Mapping[str, str] | None] = None

    def __init__(
        self, config: ConfigModel, spec: RoutingSpec, free: Sequence[ZeroComputationKind] = ()
    ) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        if self.dial is not None:
            setattr(self, self.dial, self.of_this_layer(self.dial))
        self.gate = RouterLinear(spec.d_model, spec.num_experts)
        self.free = ZeroComputationExperts(free, spec.d_model) if free else None
        self.free_gate = RouterLinear(spec.d_model, len(free)) if free else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda`, `bfloat16` and so on do: a router moves, and keeps its precision."""

        def keep(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            is_less = tensor.is_floating_point() and found.itemsize < tensor.itemsize
            return tensor.to(found.device) if is_less else found

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self

    def score(self, x_TD: Tensor, ctx: TokenContext) -> Tensor:
        """logits_TE (logits_TN with free experts) in float32, or float64 for float64 input."""
        if self.free_gate is None:
            logits_TE: Tensor = self.gate(x_TD)
            return logits_TE
        return torch.cat(fused_linear(x_TD, self.gate, self.free_gate), dim=1)

    @abstractmethod
    def select(self, logits_TE: Tensor, x_TD: Tensor, ctx: TokenContext) -> Decision:
        """Choose experts and weights for every token.

        Args:
            logits_TE: [T, E] (with free experts [T, N]), what `score` gave.
            x_TD: [T, D], the tokens, 0 where they are padding.
            ctx: `is_valid_T`, `is_vision_T` (bool) and `sequence_T` (int64) of the tokens, and the
                records of the layers below.

        Returns:
            A decision about all columns; what it says of padding is ignored.
        """

    def losses(
        self, decision: Decision, logits_TE: Tensor, ctx: TokenContext
    ) -> dict[str, LossTerm]:
        """The auxiliary losses of this layer by name; padding must not enter them.

        Args:
            decision: what `select` gave, with k = 0 for padding.
            logits_TE: as there.
            ctx: as there.

        Returns:
            By name: a scalar with gradient, and the weight that it has in the training loss.
        """
        return {}

    def step_counts(self, decision: Decision, ctx: TokenContext) -> dict[str, Tensor]:
        """What `after_step` wants to know of all tokens of a step, to be summed."""
        return {}

    def before_steps(self, experts: Experts, read_param: Read, broadcast_from_first: Read) -> None:
        """Once, before the first step of a run or of its continuation; on all ranks.

        The functions are those of `StepContext`.
        """

    def after_step(self, step_context: StepContext) -> None:
        """What follows an optimizer step: controllers, thresholds, opening and closing experts."""

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Which parameters take which learning rate: all of them, each once, by group.

        `router` takes `optim.lr` and is what the backbone has too (its gate); `predictor` takes
        `optim.predictor_lr` and is what the routing method adds.
        """
        gate = {id(p) for p in self.gate.parameters()}
        groups: dict[str, list[nn.Parameter]] = {"router": [], "predictor": []}
        for parameter in self.parameters():
            groups["router" if id(parameter) in gate else "predictor"].append(parameter)
        return groups

    def rollouts(self) -> tuple[str, ...]:
        """Forwards without gradient that each forward with gradient needs before it, by name.

        During one `ctx.rollout` is its name; what it put into `record.cache` is in `ctx.rolled_out`
        afterwards.
        """
        return ()

    @torch.no_grad()
    def adopt_gate(self, gate_ED: Tensor) -> None:
        """Start from the backbone's own pretrained gate."""
        self.gate.weight.copy_(gate_ED)

    def record_of(self, ctx: TokenContext) -> LayerRecord:
        """The slot of this router's own layer."""
        return ctx.layers[self.spec.slot]

    def decide(self, x_TD: Tensor, ctx: TokenContext) -> tuple[Decision, Tensor]:
        """Route T tokens: the decision, with k = 0 for padding, and logits_TE."""
        with without_autocast(x_TD.device.type):
            logits_TE = self.score(x_TD, ctx)
            decision = self.select(logits_TE, x_TD, ctx)
            if ctx.may_have_padding:
                mask_TE = decision.mask_TE & ctx.is_valid_T[:, None]
                decision = replace(decision, mask_TE=mask_TE)
            if self.spec.routed_scaling_factor != 1:
                weights_TE = decision.weights_TE * self.spec.routed_scaling_factor
                decision = replace(decision, weights_TE=weights_TE)
            if ctx.intervene:
                decision = ctx.intervene(self.spec.slot, decision)
            return decision, logits_TE

    def record(self, decision: Decision, logits_TE: Tensor, ctx: TokenContext) -> None:
        """Losses and statistics of a decision into the record of this layer."""
        record = self.record_of(ctx)
        record.logits_TE = logits_TE
        wants_losses = torch.is_grad_enabled() or ctx.losses_without_gradient
        if not (wants_losses or ctx.collect or ctx.trace):
            return
        with without_autocast(logits_TE.device.type):
            if wants_losses:
                record.losses = losses_by_group(
                    self.losses, self.spec.slot, decision, logits_TE, ctx
                )
            with torch.no_grad():
                if not (ctx.collect or ctx.trace):
                    return
                entropy_T = losses.entropy_bits(decision.scores_TE)
                mask_TE, free_TM = self.split(decision.mask_TE)
                k_T = mask_TE.sum(1)
                if ctx.trace:
                    record.entropy_T, record.k_T, record.mask_TE = entropy_T, k_T, mask_TE
                    record.weights_TE = self.split(decision.weights_TE)[0].detach()
                if ctx.collect:
                    record.stats = routing_stats(mask_TE, entropy_T, k_T, self.max_k, ctx)
                    if ctx.source_T is not None:
                        record.k_S = ctx.by_source(k_T, ctx.source_T)
                    if self.free is not None:
                        record.stats["free_per_token"] = Stat(
                            free_TM.sum().float(), count=ctx.is_valid_T.sum()
                        )

    def record_counts(self, decision: Decision, ctx: TokenContext) -> None:
        """What `after_step` wants to know of a training step into the record of this layer.

        Apart from `record`, because it may ask for a number on the host: no graph holds it.
        """
        if self.training:
            with torch.no_grad(), without_autocast(decision.mask_TE.device.type):
                self.record_of(ctx).step_counts = self.step_counts(decision, ctx)

    def forward(self, x_TD: Tensor, ctx: TokenContext) -> RoutingPlan:
        """All of it, and the plan of the routed experts: a router on its own."""
        x_TD = ctx.without_padding(x_TD)
        decision, logits_TE = self.decide(x_TD, ctx)
        self.record(decision, logits_TE, ctx)
        self.record_counts(decision, ctx)
        return self.plan(decision)

    def plan(self, decision: Decision) -> RoutingPlan:
        weights_TE, _ = self.split(decision.weights_TE)
        return RoutingPlan.from_mask(self.dispatched(decision), weights_TE)

    def dispatched(self, decision: Decision) -> Tensor:
        """The experts that run, bool [T, E]: those chosen, which is what k counts.

        In training there may be more, of weight 0, whose outputs the gradient of a weight needs.
        """
        mask_TE, _ = self.split(decision.mask_TE)
        return mask_TE

    def split(self, columns_TN: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of the routed experts, and of the free ones."""
        return columns_TN[:, : self.spec.num_experts], columns_TN[:, self.spec.num_experts :]

    def free_output(self, x_TD: Tensor, decision: Decision) -> Tensor | None:
        """What the chosen free experts add, y_TD; None where none can add anything."""
        if self.free is None or self.free.all_zero:
            return None
        _, mask_TM = self.split(decision.mask_TE)
        _, weights_TM = self.split(decision.weights_TE)
        y_TD: Tensor = self.free(x_TD, mask_TM, weights_TM)
        return y_TD

    def of_this_layer(self, option: str) -> float:
        """The value that a `PerLayer` option has for this layer."""
        try:
            return of_layer(getattr(self.config, option), self.spec.slot, self.spec.num_layers)
        except ConfigError as error:
            raise ConfigError(f"model.router.{option}: {error}") from None

    @classmethod
    def shared_by_samples(cls, config: Any) -> dict[str, str]:
        """What depends on which samples share an auxiliary loss, and the options that turn it off.

        {}: nothing; a step may be cut into micro-batches in any way.
        """
        if cls.batch_losses is None:
            return {} if cls.losses is Router.losses else {"its losses": ""}
        return {
            name: options
            for name, options in cls.batch_losses.items()
            if not options or any(getattr(config, option) for option in options.split())
        }

    @classmethod
    def bound_to_micro_batch(cls, config: Any) -> str:
        """What else depends on which samples share a micro-batch, in words; "": nothing does."""
        return ""

    @property
    def depends_also_on(self) -> str:
        """What else than the token itself decides its experts, in words; "": nothing else.

        A server refuses such a router: its batches hold parts of several requests.
        """
        return ""

    @property
    def dial_ends(self) -> tuple[float, float]:
        """Of a method with a `dial`: where every token gets its `min_k`, and its `max_k`."""
        raise NotImplementedError(f"{type(self).__name__} has a dial without ends")

    @property
    def min_k(self) -> int:
        """The smallest k that `select` may give a token."""
        return 0

    @property
    def max_k(self) -> int:
        """The largest k that `select` may give; the width of the k histogram."""
        return self.spec.num_experts

    @property
    def peak_mean_k(self) -> float:
        """The largest mean k of a micro-batch that the memory estimate allows for.

        A method without a bound on k gives its initial mean k, which training may exceed.
        """
        return self.max_k


def routing_stats(
    mask_TE: Tensor, entropy_T: Tensor, k_T: Tensor, max_k: int, ctx: TokenContext
) -> dict[str, Stat]:
    """What TensorBoard shows of one layer: k, entropy, their rank correlation, load per expert."""
    valid_T, vision_T = ctx.is_valid_T, ctx.is_vision_T
    num_valid = valid_T.sum()
    stats = {
        "mean_k": Stat(k_T.sum().float(), count=num_valid),
        "entropy_bits": Stat((entropy_T * valid_T).sum(), count=num_valid),
        "tokens_per_expert": Stat(mask_TE.sum(0).float(), "sum"),
    }
    for kind, of_kind_T in (("image", vision_T), ("text", ~vision_T)):
        chosen_T = of_kind_T & valid_T
        histogram = torch.bincount(k_T[chosen_T], minlength=max_k + 1).float()
        stats[f"k_histogram_{kind}"] = Stat(histogram, "sum")
        stats[f"mean_k_{kind}"] = Stat((k_T * chosen_T).sum().float(), count=chosen_T.sum())
    rho = losses.spearman(entropy_T[valid_T], k_T[valid_T])
    # Undefined where k is constant; a count of 0 keeps the set of statistics equal on all ranks.
    stats["spearman"] = (
        Stat(rho * num_valid, count=num_valid)
        if rho is not None
        else Stat(num_valid * 0.0, count=0.0)
    )
    return stats
