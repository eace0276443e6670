"""A small vision tower that has seen captions before it meets a language model, as CLIP has.

A language model that must learn to see from its own loss alone spends thousands of steps blind to
everything but colour. Here each patch votes for the words of the caption: the image's logit of a
word is the log-sum-exp over its patches, trained against "the caption has this word".

Shapes: N images, C channels, P patches, D tower width, V words.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from gemoe_ds.console import Progress


class WordVotes(nn.Module):
    """A tower under a linear reader of its patches."""

    def __init__(self, config: CLIPVisionConfig, num_words: int) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.read = nn.Linear(config.hidden_size, num_words)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """logits_NV: is the word somewhere in the picture?"""
        hidden = self.tower(pixels_NCHW, output_hidden_states=True).hidden_states[-1]
        return self.read(self.norm(hidden[:, 1:])).logsumexp(1)  # without the class token


def train_tower(
    config: CLIPVisionConfig,
    pixels_NCHW: Tensor,
    words_NV: Tensor,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> CLIPVisionModel:
    """The tower after `steps` steps, with a progress bar; pixels uint8, words bool."""
    torch.manual_seed(seed)
    model = WordVotes(config, words_NV.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    generator = torch.Generator().manual_seed(seed)
    bar = Progress(range(steps), desc="vision tower", unit="step")
    for _ in bar:
        chosen = torch.randint(len(pixels_NCHW), (batch,), generator=generator)
        logits_NV = model(pixels_NCHW[chosen].float() / 127.5 - 1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits_NV, words_NV[chosen].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return model.tower


def vision_config(image_size: int, patch_size: int, width: int, layers: int) -> CLIPVisionConfig:
    """A CLIP tower of this shape."""
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch_size,
    )
