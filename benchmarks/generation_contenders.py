"""Who writes answers: stock transformers, our model, and the code of an exported folder.

All read one folder of a random OLMoE; ours and the exported code have routers on its gates whose
predictors are random and spread. Shapes: B prompts of S tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.answers import write_recipe
from gemoe_ds.config.load import load_config
from gemoe_ds.data.collate import Batch, Encoded
from gemoe_ds.evaluation.budget import Budget, fit_budget_to
from gemoe_ds.evaluation.generate import generate
from gemoe_ds.evaluation.untrained import on_gates
from gemoe_ds.export.folder import export
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.moe.router import Router
from gemoe_ds.train.assemble import build_collator, build_model

_ROUTERS = ("top_k", "gemoe")
_K_SPREAD = 2.0  # of the predictor's logits: k differs from token to token


class Contender(ABC):
    """A model to be asked."""

    @abstractmethod
    def written(self, ids_BS: Tensor, new_tokens: int) -> list[list[int]]:
        """What is written greedily behind the prompts, no token being an end."""

    @abstractmethod
    def logits(self, ids_BS: Tensor) -> Tensor:
        """Float32 [B, S, V]"""


class OfTransformers(Contender):
    """A model whose `generate` is that of transformers: the stock one, or an exported folder's."""

    def __init__(self, folder: Path, dtype: str, *, own_code: bool = False) -> None:
        options: Any = {"dtype": getattr(torch, dtype), "trust_remote_code": own_code}
        model: Any = AutoModelForCausalLM.from_pretrained(str(folder), **options)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(device).eval()
        self.default_experts = str(model.config._experts_implementation)

    def with_experts(self, implementation: str) -> None:
        self.model.set_experts_implementation(implementation)

    @property
    def routers(self) -> list[Router]:
        """Of an exported folder."""
        return [m.gemoe.router for m in self.model.modules() if hasattr(m, "gemoe")]

    def written(self, ids_BS: Tensor, new_tokens: int) -> list[list[int]]:
        written_BS = self.model.generate(
            ids_BS,
            attention_mask=torch.ones_like(ids_BS),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return [row[ids_BS.shape[1] :] for row in written_BS.tolist()]

    @torch.no_grad()
    def logits(self, ids_BS: Tensor) -> Tensor:
        logits_BSV: Tensor = self.model(ids_BS).logits
        return logits_BSV.float()


def stock_experts() -> list[str]:
    """Ways of transformers to run experts on any device; the others are kernels for some GPUs."""
    return ["eager", *(name for name in ALL_EXPERTS_FUNCTIONS if name.endswith("_mm"))]


class Ours(Contender):
    """Our model and our `generate`: with a static router, or with GeMoE's."""

    def __init__(self, folder: Path, dtype: str) -> None:
        config = load_config(write_recipe(folder, dtype), [])
        self.model = build_model(config, ExpertShard())
        gates = [layer.router.gate.weight for layer in self.model.moe_layers]
        of = {name: (Router.named(name), Router.named(name).Config()) for name in _ROUTERS}
        self.routers_of = {
            name: on_gates(one, gates, self.model.routing) for name, one in of.items()
        }
        torch.manual_seed(1)
        for router in self.routers_of["gemoe"]:
            predictor: Any = router.eap
            weight_KD: Tensor = predictor.weight
            torch.nn.init.normal_(weight_KD, std=_K_SPREAD * weight_KD.shape[1] ** -0.5)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.collator = build_collator(config, self.model)
        self.mean_k = 0.0  # of the last answers that were counted

    def with_router(self, name: str, budget: Budget | None = None) -> None:
        routers = self.routers_of[name]
        for layer, router in zip(self.model.moe_layers, routers, strict=True):
            layer.router = router.to(next(self.model.parameters()).device).eval()
        if budget:
            budget.apply(routers)

    def budget(self, mean_k: float, ids_BS: Tensor, new_tokens: int) -> Budget:
        """That gives so many experts a token, over prompts and answers."""
        self.with_router("gemoe")

        def mean_k_L() -> Sequence[float]:
            return self._generate(ids_BS, new_tokens, count=True).mean_k_L

        return fit_budget_to(self.routers_of["gemoe"], mean_k, mean_k_L)

    def count(self, ids_BS: Tensor, new_tokens: int) -> float:
        """The mean k of these answers and their prompts."""
        k_L = self._generate(ids_BS, new_tokens, count=True).mean_k_L
        return float(sum(k_L) / len(k_L))

    def written(self, ids_BS: Tensor, new_tokens: int) -> list[list[int]]:
        return generate(
            self.model, self._batch(ids_BS), max_new_tokens=new_tokens, end_ids=set(), count=False
        ).token_ids

    @torch.no_grad()
    def logits(self, ids_BS: Tensor) -> Tensor:
        valid_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        with self.model.autocast(ids_BS.device):
            hidden_BSD = self.model.hidden(ModelInputs(ids_BS, valid_BS, ~valid_BS))
            logits_BSV: Tensor = self.model.backbone.head(self.model.hf)(hidden_BSD)
        return logits_BSV.float()

    def export(self, router: str, folder: Path, out: Path) -> Path:
        """A folder that routes by this router as it is now."""
        self.with_router(router)
        provenance = {"base": str(folder)}
        options: Any = {"base": folder, "tokenizer": folder, "provenance": provenance}
        export(self.model, {}, router={"name": router}, out=out, **options)
        return out

    def _generate(self, ids_BS: Tensor, new_tokens: int, *, count: bool) -> Any:
        done = generate(
            self.model, self._batch(ids_BS), max_new_tokens=new_tokens, end_ids=set(), count=count
        )
        return done.prompts + done.steps

    def _batch(self, ids_BS: Tensor) -> Batch:
        prompts = [Encoded(row, str(row)) for row in range(len(ids_BS))]
        for prompt, ids in zip(prompts, ids_BS.tolist(), strict=True):
            prompt.add(ids)
        return self.collator.batch(prompts, left=True).to(ids_BS.device)
