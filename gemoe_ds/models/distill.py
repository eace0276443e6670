"""Self-distillation: the frozen backbone, at its own k by its own gates, teaches the routers.

Shapes: B sequences, S tokens, P positions at which the teacher is listened to, D model, V
vocabulary.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.registry import ConfigModel

_AT_ONCE = 256  # rows of logits that are float32 at a time


class Distill(ConfigModel):
    """Options of a run: loss = (1 - weight) CE + weight T^2 KL(teacher || student) + the others."""

    weight: Annotated[FiniteFloat, Field(gt=0, le=1)] = Field(
        0.5, description="share of the divergence in the loss, the rest is cross-entropy; in (0, 1]"
    )
    tokens: Literal["answers", "text", "all"] = Field(
        "answers",
        description="positions that are distilled. answers: the next token is a target; text: the "
        "next token is no image's; all: every one but padding",
    )
    temperature: Annotated[FiniteFloat, Field(gt=0)] = Field(
        1.0, description="both models' logits are divided by it"
    )

    def positions(self, labels_BS: Tensor, inputs: ModelInputs) -> Tensor:
        """Where the teacher is listened to, bool [B, S]; before every target, at least."""
        at_BS = following(labels_BS) != -100
        if self.tokens == "all":
            return at_BS | inputs.is_valid_BS
        if self.tokens == "text":
            is_text_BS = inputs.is_valid_BS & ~inputs.is_vision_BS
            is_next_BS = is_text_BS[:, 1:] & inputs.is_valid_BS[:, :-1]
            if inputs.document_BS is not None:
                is_next_BS &= inputs.document_BS[:, 1:] == inputs.document_BS[:, :-1]
            at_BS[:, :-1] |= is_next_BS
        return at_BS

    def mixed(self, lm: Tensor, kl: Tensor) -> Tensor:
        """The part of the loss that is of tokens; T^2 keeps the size of the divergence's gradient
        (Hinton et al. 2015)."""
        return (1 - self.weight) * lm + self.weight * self.temperature**2 * kl


def following(labels_BS: Tensor) -> Tensor:
    """The label of the token after each, -100 where there is none."""
    return torch.nn.functional.pad(labels_BS[:, 1:], (0, 1), value=-100)


def divergence(logits_PV: Tensor, teacher_PV: Tensor, temperature: float) -> Tensor:
    """Sum over positions of KL(teacher || student), of both models' softmax(logits / T); float32.

    Differentiable once, in `logits_PV`.
    """
    total: Tensor = _Divergence.apply(logits_PV, teacher_PV, temperature)
    return total


class _Divergence(torch.autograd.Function):
    """Its gradient is worked out in the forward pass, some rows at a time: a float32 copy of all
    logits, and four more of that size, are never there."""

    @staticmethod
    def forward(ctx: Any, logits_PV: Tensor, teacher_PV: Tensor, temperature: float) -> Tensor:
        grad_PV = torch.empty_like(logits_PV)
        total = torch.zeros((), device=logits_PV.device)
        parts = (rows_PV.split(_AT_ONCE) for rows_PV in (logits_PV, teacher_PV, grad_PV))
        for mine, wanted, grad in zip(*parts, strict=True):
            log_q = (mine.float() / temperature).log_softmax(-1)
            log_p = (wanted.float() / temperature).log_softmax(-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            grad.copy_((log_q.exp() - p) / temperature)
        ctx.save_for_backward(grad_PV)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (grad_PV,) = ctx.saved_tensors
        return grad_PV * grad, None, None
