"""MoEModel: a backbone whose MoE blocks are ours, and the loss of one micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemoe_ds.errors import ConfigError
from gemoe_ds.hf_io.allocator import LOCAL, WeightAllocator
from gemoe_ds.hf_io.loader import Weights, materialise
from gemoe_ds.hf_io.renamed import Renamed
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.blocks import convert_blocks
from gemoe_ds.models.by_source import ce_by_target, sums_by_source
from gemoe_ds.models.distill import Distill, divergence, following
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.models.quantised_linear import quantise_linear_maps
from gemoe_ds.models.shard import ExpertShard, stored_blocks
from gemoe_ds.moe.context import TEACHER, Rollout, TokenContext
from gemoe_ds.moe.layer import MoELayer
from gemoe_ds.moe.router import Router
from gemoe_ds.progress import PROGRESS


def _say_where(layer: MoELayer, args: object) -> None:
    PROGRESS.enter_layer(layer.router.spec.slot)


def _narrow(hf: nn.Module, layers: list[MoELayer], dtype: torch.dtype) -> None:
    """What does not train, routers excepted, in `dtype`."""
    of_routers = {id(p) for layer in layers for p in layer.router.parameters()}
    for parameter in hf.parameters():
        if not parameter.requires_grad and id(parameter) not in of_routers:
            parameter.data = parameter.data.to(dtype)


class MoEModel(nn.Module):
    """The converted model. `forward` returns the loss parts; `logits` serves evaluation.

    Everything that does not train is stored in `dtype`; what trains stays float32 (the optimizer
    updates it directly, and routing is float32 by construction).
    """

    def __init__(
        self, backbone: Backbone, hf: nn.Module, shard: ExpertShard, dtype: torch.dtype
    ) -> None:
        """Before its blocks are converted: `from_checkpoint` does that."""
        super().__init__()
        self.backbone, self.hf, self.shard, self.dtype = backbone, hf, shard, dtype
        blocks = backbone.moe_blocks(hf)
        self.routing = [
            replace(block.routing, slot=n, num_layers=len(blocks)) for n, block in enumerate(blocks)
        ]
        self.block_paths = [block.path for block in blocks]
        self.expert_names = [(*block.names[1:], block.shared_name) for block in blocks]
        self._stock_names = {
            f"{block.path}.{ours}": f"{block.path}.{stock}"
            for block in blocks
            for ours, stock in block.stock_names.items()
        }
        self.num_parameters = sum(p.numel() for p in hf.parameters())
        self.params_per_expert = [block.params_per_expert for block in blocks]
        self.num_added_parameters = 0
        self.image_layout = backbone.image_layout(hf)
        self.context_length = backbone.context_length(hf)
        self.ctx = TokenContext(len(blocks))
        self.distill: Distill | None = None

    @classmethod
    def from_checkpoint(
        cls,
        backbone: Backbone,
        checkpoint: Path | None,
        tokenizer_dir: Path,
        router: tuple[type[Router], Any],
        *,
        train: str = "routers",
        dtype: torch.dtype = torch.float32,
        experts_dtype: str | None = None,
        dense_dtype: str | None = None,
        shard: ExpertShard | None = None,
        activation_checkpointing: bool = False,
        pack_experts: bool = False,
        memory: WeightAllocator = LOCAL,
        show_progress: bool = False,
    ) -> MoEModel:
        """The converted model of a folder, its weights read as they are needed here.

        Collective if the memory is common to several ranks.
        """
        # 1. The stock model: of a folder its shapes alone.
        stock = backbone.load(checkpoint, tokenizer_dir)
        model = cls(backbone, stock, shard or ExpertShard(), dtype)
        hf, weights = model.hf, None
        if checkpoint and any(parameter.is_meta for parameter in hf.parameters()):
            weights = Weights(checkpoint, backbone.keys, hf, backbone.may_lack)
        blocks = backbone.moe_blocks(hf)
        if not blocks:
            raise ConfigError(f"backbone {backbone.name!r}: no MoE block found in the loaded model")
        # 2. Our layers, with the experts of this rank.
        hf.requires_grad_(train == "all")
        of_experts = torch.float32 if train != "routers" else dtype
        source = stored_blocks(experts_dtype, model.shard, of_experts, weights, blocks, memory)
        layers = convert_blocks(
            blocks,
            router,
            model.ctx,
            source,
            trainable=train != "routers",
            pack=pack_experts,
            make_dispatcher=model.shard.make_dispatcher,
            keep_base=train == "routers",
        )
        # 3. Whatever is still a shape.
        rest = quantise_linear_maps(hf, dense_dtype, dtype) if dense_dtype else {}
        if weights is not None:
            rest |= materialise(hf, dtype, memory)
            named = {model._stock_names.get(name, name): target for name, target in rest.items()}
            weights.fill(source.targets | named, memory, show_progress=show_progress)
        _narrow(hf, layers, dtype)
        for layer in layers:
            layer.register_forward_pre_hook(_say_where)
        own = (p for layer in layers for p in layer.router.param_groups()["predictor"])
        model.num_added_parameters = sum(p.numel() for p in own)
        if activation_checkpointing:
            hf.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        return model

    @property
    def moe_layers(self) -> list[MoELayer]:
        return [module for module in self.hf.modules() if isinstance(module, MoELayer)]

    @property
    def updates_per_batch(self) -> int:
        return self.moe_layers[0].router.updates_per_batch

    @property
    def rollouts(self) -> tuple[str, ...]:
        """What the routers want to see of a batch before they train on it."""
        return self.moe_layers[0].router.rollouts()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that trains, by name."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def router_state(self) -> dict[str, Tensor]:
        """What the routers hold beside what trains, by name; equal on all ranks.

        Buffers, and frozen parameters: one that was drawn at random is nowhere else.
        """
        return {
            f"{path}.router.{name}": tensor
            for path, layer in self.named_modules()
            if isinstance(layer, MoELayer)
            for tensors in (layer.router.named_buffers(), layer.router.named_parameters())
            for name, tensor in tensors
            if not tensor.requires_grad
        }

    def router_only_names(self) -> set[str]:
        """Parameters that the backbone does not have: those of the routers beside the gate."""
        added = {
            id(p) for layer in self.moe_layers for p in layer.router.param_groups()["predictor"]
        }
        return {name for name, p in self.named_parameters() if id(p) in added}

    def stock_tensors(self, trained: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of tensors by our names those that the model has as it is loaded, by its names."""
        buffers = self.router_state().keys() - dict(self.named_parameters()).keys()
        own = self.router_only_names() | buffers
        names = {n: n.removeprefix("hf.") for n in trained if n not in own}
        return Renamed(trained, {self._stock_names.get(s, s): n for n, s in names.items()})

    def sharded_parameters(self) -> dict[str, nn.Parameter]:
        """Those of `trainable` of which this rank holds its own experts only: [E_local, ...]."""
        if self.shard.num_ranks == 1:
            return {}
        of_experts = {id(p) for layer in self.moe_layers for p in layer.experts.parameters()}
        return {n: p for n, p in self.trainable().items() if id(p) in of_experts}

    def activated_parameters(self, mean_k_L: list[float]) -> int:
        """Parameters that a token uses: all but the experts it does not visit.

        Counts the backbone (the paper's "N"); predictors are left out, as in its tables.
        """
        idle = sum(
            (spec.num_experts - k) * per_expert
            for spec, k, per_expert in zip(
                self.routing, mean_k_L, self.params_per_expert, strict=True
            )
        )
        return round(self.num_parameters - idle)

    def hidden(self, inputs: ModelInputs) -> Tensor:
        """The last hidden states [B, S, D]; the context then holds what was routed."""
        self.ctx.begin(inputs.is_valid_BS, inputs.is_vision_BS, inputs.document_BS)
        hidden_BSD = self.backbone.hidden(self.hf, inputs)
        self.ctx.end()
        return hidden_BSD

    @torch.no_grad()
    def next_logits(self, inputs: ModelInputs) -> Tensor:
        """Logits float32 [B, V] of the token that follows the last one; `inputs.past` is extended.

        Padding stands left of everything.
        """
        self.ctx.rolled_out = {}
        with self.autocast(inputs.input_ids_BS.device):
            hidden_BSD = self.hidden(inputs)
            logits_BV: Tensor = self.backbone.head(self.hf)(hidden_BSD[:, -1])
        return logits_BV.float()

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def forward(
        self,
        input_ids_BS: Tensor,
        labels_BS: Tensor,
        is_valid_BS: Tensor,
        is_vision_BS: Tensor,
        images: dict[str, Tensor],
        document_BS: Tensor | None = None,
        targets_per_micro_batch: float | None = None,
        auxiliary_weight: float = 1.0,
        token_weight: float = 1.0,
        rolled_out: dict[str, Rollout] | None = None,
        taught_PD: Tensor | None = None,
        distilled_per_micro_batch: float | None = None,
        roll_out: bool = False,
        teach: bool = False,
        score: bool = False,
    ) -> dict[str, Any]:
        """The loss of a micro-batch and its parts by name (scalars).

        `lm` is the sum of the token cross-entropies over `targets_per_micro_batch`, by default
        the number of targets here. The trainer gives the mean over all micro-batches of the step,
        on all ranks, so that every target of the global batch weighs the same. Auxiliary losses
        are means over layers (GeMoE Eq. 13): `loss` = lm + sum of weight * value. The trainer's
        two weights make them means over the step: over its groups of samples, or its tokens.

        With `roll_out` the result is that of the forwards which the routers want before, to be
        handed in as `rolled_out` with the same inputs; with `teach` that of `_teach`, to be handed
        in as `taught_PD`; with `score` that of `_score`. All come this way since ZeRO 3 gathers the
        weights of a model that is called as a whole.
        """
        inputs = ModelInputs(input_ids_BS, is_valid_BS, is_vision_BS, images, None, document_BS)
        if score:
            return dict(self._score(inputs, labels_BS))
        if roll_out:
            return dict(self._roll_out(inputs, labels_BS))
        if teach:
            return self._teach(inputs, labels_BS)
        self.ctx.rolled_out = rolled_out or {}
        next_BS = following(labels_BS)
        at_BS = next_BS != -100 if taught_PD is None else self._distilled(inputs, labels_BS)
        logits, targets = self._logits(at_BS, next_BS, inputs)
        parts = {}
        if taught_PD is not None:
            parts["distill"] = self._divergence(logits, taught_PD, distilled_per_micro_batch)
            is_target = targets != -100
            logits, targets = logits[is_target], targets[is_target]
        ce_sum = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        if targets_per_micro_batch is None:
            targets_per_micro_batch = max(targets.numel(), 1)
        parts["lm"] = loss = ce_sum / targets_per_micro_batch
        if self.distill and taught_PD is not None:
            loss = self.distill.mixed(loss, parts["distill"])
        for name, term in self.ctx.mean_losses().items():
            loss = loss + term.weighed(auxiliary_weight, token_weight)
            parts[name] = term.value
        found = {"loss": loss} | {name: part.detach() for name, part in parts.items()}
        if self.ctx.collect and self.ctx.source_T is not None:
            found["by_source_S2"] = sums_by_source(self.ctx, logits, targets, next_BS != -100)
        return found

    @torch.no_grad()
    def _roll_out(self, inputs: ModelInputs, labels_BS: Tensor) -> dict[str, Rollout]:
        self.ctx.rolled_out = {}
        done: dict[str, Rollout] = {}
        is_scored_BS = following(labels_BS) != -100
        for name in self.rollouts:
            self.ctx.rollout = name
            try:
                logits, targets = self.target_logits(inputs, labels_BS)
            finally:
                self.ctx.rollout = None
            log_p_BS = logits.new_zeros(labels_BS.shape, dtype=torch.float32)
            log_p_BS[is_scored_BS] = -nn.functional.cross_entropy(
                logits.float(), targets, reduction="none"
            )
            keep = [record.cache for record in self.ctx.layers]
            done[name] = Rollout(log_p_BS.flatten(), is_scored_BS.flatten(), keep)
        return done

    @torch.no_grad()
    def _teach(self, inputs: ModelInputs, labels_BS: Tensor) -> dict[str, Tensor]:
        """`taught_PD`: the last hidden states of the backbone as it was, where they are distilled.

        Its logits follow from these, which are far fewer numbers to keep. Without dropout.
        """
        training = [module for module in self.modules() if module.training]
        self.eval()
        self.ctx.rolled_out, self.ctx.rollout = {}, TEACHER
        try:
            with self.autocast(labels_BS.device):
                hidden_BSD = self.hidden(inputs)
        finally:
            self.ctx.rollout = None
            for module in training:
                module.training = True
        return {"taught_PD": hidden_BSD[self._distilled(inputs, labels_BS)]}

    def _distilled(self, inputs: ModelInputs, labels_BS: Tensor) -> Tensor:
        assert self.distill is not None, "only a model with a teacher is taught"
        return self.distill.positions(labels_BS, inputs)

    def _divergence(
        self, logits_PV: Tensor, taught_PD: Tensor, per_micro_batch: float | None
    ) -> Tensor:
        """Mean KL(teacher || student) of a position, as `lm` is the mean of a target."""
        assert self.distill is not None, "only a model with a teacher is taught"
        with torch.no_grad(), self.autocast(taught_PD.device):
            teacher_PV = self.backbone.head(self.hf)(taught_PD)
        kl = divergence(logits_PV, teacher_PV, self.distill.temperature)
        return kl / (per_micro_batch or max(len(taught_PD), 1))

    def target_logits(self, inputs: ModelInputs, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Logits only where the NEXT token is a target: the head is wide, the answers are short."""
        next_BS = following(labels_BS)
        return self._logits(next_BS != -100, next_BS, inputs)

    def _logits(self, at_BS: Tensor, next_BS: Tensor, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Logits and targets where `at_BS` says."""
        # Asked for by the mask, the host would wait three times, behind the forward and the loss.
        at_P = at_BS.flatten().nonzero().squeeze(1)
        with self.autocast(at_BS.device):
            hidden_PD = self.hidden(inputs).flatten(0, 1).index_select(0, at_P)
            return self.backbone.head(self.hf)(hidden_PD), next_BS.flatten().index_select(0, at_P)

    @torch.no_grad()
    def _score(self, inputs: ModelInputs, labels_BS: Tensor) -> dict[str, Tensor]:
        """`correct_BS`: whether the greedy choice equals the label, bool; False where there is no
        label. `ce_B`: the sum of the cross-entropies of a sequence's labels, float64.

        An answer whose every token is predicted given the ones before is what greedy generation
        would have written, so no generation loop is needed to score exact matches.
        """
        self.ctx.rolled_out = {}
        logits, targets = self.target_logits(inputs, labels_BS)
        correct_BS = torch.zeros_like(labels_BS, dtype=torch.bool)
        correct_BS[:, 1:][labels_BS[:, 1:] != -100] = logits.argmax(-1) == targets
        ce_BS = torch.zeros(labels_BS.shape, device=logits.device)
        ce_BS[:, 1:][labels_BS[:, 1:] != -100] = ce_by_target(logits, targets)
        return {"correct_BS": correct_BS, "ce_B": ce_BS.double().sum(1)}
