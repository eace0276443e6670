"""A text model from an exported folder, and two batches for it that differ in their padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for padded in (0, 1):
        ids = torch.randint(6, 28, (2, 24), generator=generator)
        mask = torch.ones_like(ids)
        mask[padded, :16] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Of tokens that are no padding."""
    found: Tensor = model(**batch).logits
    return found[batch["attention_mask"].bool()]
