"""MoELayer: route -> dispatch -> experts -> combine (+ free and shared experts)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.after_step import after_step, before_steps
from gemoe_ds.moe.context import TEACHER, TokenContext
from gemoe_ds.moe.dense_gradient import with_dense_gradient
from gemoe_ds.moe.dispatch import Dispatcher, LocalDispatcher, known_sizes
from gemoe_ds.moe.experts.module import Experts
from gemoe_ds.moe.passes import in_backward
from gemoe_ds.moe.router import Decision, Router, RoutingSpec
from gemoe_ds.moe.step_context import Assign, Read
from gemoe_ds.moe.step_counts import StepCounts


class MoELayer(nn.Module):
    """Stands where a dense FFN or a model's own MoE block stood: y = moe(x).

    `MoELayer.build` makes one for any model. The constructor is for models whose layers share a
    `TokenContext`, which the model begins and ends around every forward.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        dispatcher: Dispatcher,
        ctx: TokenContext,
        shared: nn.Module | None = None,
    ) -> None:
        """`shared` (x_TD -> y_TD) is added for every token, whatever was routed."""
        super().__init__()
        self.router = router
        self.experts = experts
        self.dispatcher = dispatcher
        self.ctx = ctx
        self.shared = shared
        self.base: Router | None = None  # the backbone's own router, which never trains
        self.dense_gradient = False  # the gate learns from the experts that are not chosen, too
        self.stands_alone = False  # has its context for itself
        self._shape = torch.Size([0])  # [...] of the last x
        self._counts = StepCounts(1)

    @classmethod
    def build(
        cls,
        *,
        d_model: int,
        d_ff: int,
        num_experts: int,
        top_k: int,
        router: str | type[Router] = "gemoe",
        norm_topk_prob: bool = False,
        shared: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> MoELayer:
        """A layer of freshly initialised SwiGLU experts, all of which trains.

        It keeps its own record of every forward: several layers in one model, recomputation
        (`torch.utils.checkpoint`), `eval()` and `torch.no_grad()` need nothing else. Its router
        computes in float32 whatever the dtype of x.

        Args:
            d_model: width D of the tokens.
            d_ff: width F of each expert: y = W_down (silu(W_gate x) * W_up x), Shazeer 2020.
            num_experts: E.
            top_k: k of a static router; the largest k of GeMoE, unless `k_high` says otherwise.
            router: name of a routing method (`Router.names()` lists them), or its class.
            norm_topk_prob: divide the weights of a token's experts by their sum.
            shared: a module [T, D] -> [T, D] whose output is added for every token.
            device, dtype: of the experts, torch's defaults if None; routers are float32.
            **options: of the router, `Router.named(name).Config`, e.g. `k_low=1`.

        Returns:
            A module with E * 3 * D * F expert parameters and those of the router.

        Raises:
            ConfigError: a size below 1, top_k above num_experts, an unknown router or option.

        Source: GeMoE, arXiv 2606.26287, Eqs. 8 to 13, for the default; docs/routers.md for others.
        """
        _check_sizes(d_model=d_model, d_ff=d_ff, num_experts=num_experts, top_k=top_k)
        router_class, config = Router.configured(router, options)
        spec = RoutingSpec(d_model, num_experts, top_k, norm_topk_prob)
        gate_up_EGD = torch.randn(num_experts, 2 * d_ff, d_model, device=device, dtype=dtype)
        down_EDF = torch.randn(num_experts, d_model, d_ff, device=device, dtype=dtype)
        ctx = TokenContext(1)
        ctx.losses_without_gradient = ctx.trace = True
        layer = cls(
            router_class(config, spec).to(device),
            Experts(gate_up_EGD * d_model**-0.5, down_EDF * d_ff**-0.5, trainable=True),
            LocalDispatcher(),
            ctx,
            shared,
        )
        layer.stands_alone = True
        before_steps([(layer.router, layer.experts)])
        return layer

    def forward(
        self, x: Tensor, is_valid: Tensor | None = None, is_vision: Tensor | None = None
    ) -> Tensor:
        """Route every token, apply its experts, add up.

        Args:
            x: [..., D], floating point. The last dimension before D is the sequence.
            is_valid: bool (or 0 and 1) [...]; False is padding, which gets k = 0, enters no loss
                and comes out as 0 (plus `shared` of 0). None: no padding.
            is_vision: bool [...]; tokens of an image, for routers that treat them differently
                (ltdr, evomoe). None: all are text.

        Returns:
            y [..., D] in the dtype of x; 0 for a token of k = 0.

        Raises:
            ValueError: a shape or dtype that does not fit.
            RuntimeError: the layer shares its context with others, and no forward was begun.
        """
        if not torch.compiler.is_compiling() or not self.stands_alone:
            y: Tensor = self._eager(x, is_valid, is_vision)
            return y
        # Routing is a graph. What stands before it is bookkeeping in Python, and what stands after
        # it has other shapes in every step, in products that are kernels already: two breaks. Not
        # in a function of its own, whose call would be one more.
        x_TD, ctx = self._begin_compiled(x, is_valid, is_vision)
        router = self._router_in(ctx)
        decision, logits_TE = router.decide(x_TD, ctx)
        router.record(decision, logits_TE, ctx)
        y = self._finish_compiled(x_TD, decision, logits_TE, ctx, x.shape)
        return y

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the slot differs from layer to layer
    def _eager(self, x: Tensor, is_valid: Tensor | None, is_vision: Tensor | None) -> Tensor:
        if not self.stands_alone:
            if is_valid is not None or is_vision is not None:
                raise RuntimeError(
                    "this MoE layer shares its context with others: the masks are given to their "
                    "model, or to ctx.begin(is_valid_BS, is_vision_BS)"
                )
            self._shape = x.shape[:-1]
            with self.ctx.writing(self.router.spec.slot, x.shape[:-1].numel()):
                return self._forward(x, self.ctx)
        ctx = self._begin(x, is_valid, is_vision)
        try:
            y = self._forward(x, ctx)
        except BaseException:  # recomputation stops early, by an exception
            self.ctx.end(failed=ctx is self.ctx)
            raise
        self._end(ctx)
        return y

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin_compiled(
        self, x: Tensor, is_valid: Tensor | None, is_vision: Tensor | None
    ) -> tuple[Tensor, TokenContext]:
        ctx = self._begin(x, is_valid, is_vision)
        # Masks of their own: a graph for a view of what was given would not do for no mask at all.
        ctx.is_valid_T, ctx.is_vision_T = ctx.is_valid_T.clone(), ctx.is_vision_T.clone()
        return ctx.without_padding(x.reshape(-1, x.shape[-1])), ctx

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _finish_compiled(
        self,
        x_TD: Tensor,
        decision: Decision,
        logits_TE: Tensor,
        ctx: TokenContext,
        shape: torch.Size,
    ) -> Tensor:
        self._router_in(ctx).record_counts(decision, ctx)
        preprocessed = self._dispatch_preprocess(decision, ctx)
        y_TD = self._combine(x_TD, decision, logits_TE, preprocessed, ctx)
        self._end(ctx)
        return y_TD.view(shape)

    def _begin(self, x: Tensor, is_valid: Tensor | None, is_vision: Tensor | None) -> TokenContext:
        """Of a layer that stands alone: start a forward; the context that it runs in."""
        self._shape = x.shape[:-1]
        d_model = self.router.spec.d_model
        if x.dim() == 0 or x.shape[-1] != d_model or not x.is_floating_point():
            raise ValueError(
                f"x is {x.dtype} of shape {list(x.shape)}; floating-point tokens [..., {d_model}] "
                "are wanted"
            )
        valid_BS = None if is_valid is None else _mask("is_valid", is_valid, x)
        none_BS = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
        vision_BS = _mask("is_vision", none_BS if is_vision is None else is_vision, x)
        return self.ctx.begin_alone(valid_BS, vision_BS)

    def _end(self, ctx: TokenContext) -> None:
        """The forward that ran in this context, which `_begin` gave, is over."""
        self.ctx.end_alone(ctx)
        if self.training and torch.is_grad_enabled() and not in_backward():
            self._counts.add(self.ctx)
        elif not self.training:
            self._counts.warn_if_unread(self.router.name)

    def aux_loss(self) -> Tensor:
        """The auxiliary losses of the last forward: sum of weight * value, to be added to the loss.

        Of several layers take the mean, as GeMoE's Eq. 13 does: sum(m.aux_loss() for m in layers)
        / len(layers). May be asked again until the backward pass. Under `torch.no_grad()` it is
        a value only.

        Returns:
            A float32 scalar; 0 for a method without auxiliary losses.

        Raises:
            RuntimeError: there is no forward yet; the last one has had its backward pass, or ran
                without gradients; another one, that may still go backward, was not asked; the
                layer shares its context with others, whose model is to be asked.
        """
        if not self.stands_alone:
            raise RuntimeError(
                "this MoE layer shares its context with others: ask their model for the auxiliary "
                "losses, as handle.aux_loss() of what convert() returned"
            )
        self.refuse_rollouts()
        return self.ctx.aux_loss()

    def after_step(
        self,
        step: int,
        total_steps: int,
        *,
        assign_: Assign | None = None,
        read_param: Read | None = None,
    ) -> None:
        """Call after `optimizer.step()`: the routers with a controller or a schedule work here.

        Without it a router that overrides `Router.after_step` stays as it starts (docs/api.md
        names them); others ignore it.

        Args:
            step: counted from 1.
            total_steps: of the whole run.
            assign_, read_param: how a parameter is written and read where it is not whole:
                `gemoe_ds.engine.zero.assign_` and `full_value` under DeepSpeed's ZeRO.

        Raises:
            ValueError: a step outside 1..total_steps.
            RuntimeError: a parameter of ZeRO would be written without `assign_`.
        """
        layers = [(self.router, self.experts)]
        after_step(layers, self._counts, step, total_steps, assign_, read_param)

    def refuse_rollouts(self) -> None:
        """RuntimeError if the router now learns from forwards that only gemoe_ds.train runs."""
        if self.training and self.router.rollouts():
            raise RuntimeError(
                f"router {self.router.name!r} learns from rollouts by now, forwards before the one "
                "that trains, which gemoe_ds.train runs; here its warm-up can be trained, and "
                "eval() uses it"
            )

    @property
    def k(self) -> Tensor:
        """How many experts each token of the last forward got, int64 [...]; 0 for padding."""
        k_T = self.router.record_of(self.ctx).k_T
        if k_T is None:
            raise RuntimeError("k: the layer has not run yet, or ctx.trace is off")
        return k_T.view(self._shape)

    def _forward(self, x_BSD: Tensor, ctx: TokenContext) -> Tensor:
        # One copy for all that follows: nothing here keeps the rows as they came.
        x_TD = ctx.without_padding(x_BSD.reshape(-1, x_BSD.shape[-1]))
        # Not as module calls: the hooks of ZeRO 3 know tensors only, and there is no need of them.
        router = self._router_in(ctx)
        decision, logits_TE = router.decide(x_TD, ctx)
        preprocessed = self._dispatch_preprocess(decision, ctx)
        router.record(decision, logits_TE, ctx)  # while the counts travel
        router.record_counts(decision, ctx)
        return self._combine(x_TD, decision, logits_TE, preprocessed, ctx).view(x_BSD.shape)

    def _router_in(self, ctx: TokenContext) -> Router:
        """Which of its routers decides in this context."""
        router = self.base if ctx.rollout == TEACHER else self.router
        if ctx.routers is not None:
            router = ctx.routers[self.router.spec.slot]
        assert router is not None, "a model that has a teacher has kept its gates"
        return router

    def _dispatch_preprocess(self, decision: Decision, ctx: TokenContext) -> Any:
        """Start what only needs to know who goes where; the result goes into `_combine`."""
        router = self._router_in(ctx)
        writes = not self.training and not torch.is_grad_enabled()
        sizes = known_sizes(router, ctx, writes=writes)
        return self.dispatcher.dispatch_preprocess(router.dispatched(decision), sizes)

    def _combine(
        self,
        x_TD: Tensor,
        decision: Decision,
        logits_TE: Tensor,
        preprocessed: Any,
        ctx: TokenContext,
    ) -> Tensor:
        """What the chosen experts make of the tokens, y_TD: the part after routing."""
        router = self._router_in(ctx)
        weights_TE, _ = router.split(decision.weights_TE)
        mask_TE = router.dispatched(decision)
        if self.training and ctx.has_gradient and not torch.is_grad_enabled():
            if router.losses(decision, logits_TE, ctx):
                raise RuntimeError(
                    "the forward was begun with gradients, but a MoE layer runs without: its "
                    "auxiliary losses would be lost; recompute with use_reentrant=False, or begin "
                    "under torch.no_grad()"
                )

        def beside(x_TD: Tensor) -> Tensor | None:  # while the rows travel
            free_TD = router.free_output(x_TD, decision)
            shared_TD: Tensor | None = None if self.shared is None else self.shared(x_TD)
            if free_TD is None or shared_TD is None:
                return shared_TD if free_TD is None else free_TD
            return free_TD + shared_TD

        y_TD = self.dispatcher(x_TD, weights_TE, preprocessed, self.experts, beside)
        if self.dense_gradient and weights_TE.requires_grad:
            others_TE = ~mask_TE & ctx.is_valid_T[:, None]
            parts = -(-router.spec.num_experts // router.spec.top_k)
            y_TD = with_dense_gradient(y_TD, weights_TE, x_TD, others_TE, parts, self._sum_of)
        ctx.watch(router.spec.slot, y_TD, training=self.training)
        return y_TD

    def _sum_of(self, x_TD: Tensor, weights_TE: Tensor, mask_TE: Tensor) -> Tensor:
        """The weighted sum of these experts alone."""
        preprocessed = self.dispatcher.dispatch_preprocess(mask_TE)
        return self.dispatcher(x_TD, weights_TE, preprocessed, self.experts)


def _mask(name: str, mask: Tensor, x: Tensor) -> Tensor:
    """Of the tokens of x: bool [B, S]."""
    mask = torch.as_tensor(mask, device=x.device)
    if mask.shape != x.shape[:-1] or mask.is_floating_point() or mask.is_complex():
        raise ValueError(
            f"{name} is {mask.dtype} of shape {list(mask.shape)}; bool of shape "
            f"{list(x.shape[:-1])}, one for each token, is wanted"
        )
    length = mask.shape[-1] if mask.dim() else 1
    num_sequences = mask.numel() // length if length else 0
    return (mask != 0).reshape(num_sequences, length)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"{name}={size!r}: a whole number from 1 on is wanted")
    if sizes["top_k"] > sizes["num_experts"]:
        raise ConfigError(f"top_k={sizes['top_k']} exceeds num_experts={sizes['num_experts']}")
