"""A tiny model, tokenizer and batches on disk and in memory, shared by the tests."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

import gemoe_ds.routers  # noqa: F401  (registers every router)
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.models.random_checkpoint import write_word_tokenizer
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.models.tiny.backbone import TinyBackbone
from gemoe_ds.moe.router import Router

WORDS = ["<pad>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:", *"abcdefghijklmnopqrst"]
SHAPE = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_experts": 8,
    "top_k": 4,
    "expert_width": 8,
    "image_size": 16,
    "patch_size": 8,
    "vision_width": 16,
    "vision_layers": 1,
}
IMAGE_TOKENS = 4


def write_tokenizer(
    folder: Path, plain: tuple[str, ...] = (), specials: dict[str, int] | None = None
) -> Path:
    """`specials`: further special tokens and their ids, which may lie far above all others."""
    specials = {"<image>": 3} | (specials or {})
    words = {word: i for i, word in enumerate([*WORDS, *plain])} | specials
    write_word_tokenizer(words, specials, folder)
    return folder


def write_base(folder: Path) -> tuple[Path, Path]:
    """A random tiny model as a Hugging Face folder, and a tokenizer folder."""
    tokenizer = write_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    hf = TinyBackbone(TinyBackbone.Config(**SHAPE)).load(None, tokenizer)
    hf.save_pretrained(folder / "hf")
    return folder / "hf", tokenizer


def make_model(
    base: tuple[Path, Path],
    router: str = "gemoe",
    options: dict | None = None,
    shard: ExpertShard | None = None,
    seed: int = 0,
    **kwargs: object,
) -> MoEModel:
    torch.manual_seed(seed)
    chosen = Router.named(router)
    return MoEModel.from_checkpoint(
        TinyBackbone(TinyBackbone.Config()),
        base[0],
        base[1],
        (chosen, chosen.Config(**(options or {}))),
        shard=shard,
        **kwargs,
    )


def random_batch(seed: int, batch: int = 2, length: int = 14, images: bool = True) -> dict:
    """Tensors of `MoEModel.forward`: an image, random text and targets, ragged padding."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, len(WORDS), (batch, length), generator=g)
    vision = torch.zeros(batch, length, dtype=torch.bool)
    if images:
        vision[:, 1 : 1 + IMAGE_TOKENS] = True
    ids[:, 0] = 1
    ids[vision] = 3
    feature = torch.full((batch * length,), -1)
    feature[vision.flatten()] = torch.arange(int(vision.sum()))
    lengths = torch.randint(length // 2 + 1, length + 1, (batch,), generator=g)
    valid = torch.arange(length) < lengths[:, None]
    is_label = (torch.rand(batch, length, generator=g) < 0.5) & valid & ~vision
    is_label[:, IMAGE_TOKENS + 1] = True
    return {
        "input_ids_BS": ids.masked_fill(~valid, 0),
        "labels_BS": ids.masked_fill(~is_label, -100),
        "is_valid_BS": valid,
        "is_vision_BS": vision & valid,
        "images": {
            "pixels": torch.randn(batch if images else 1, 3, 16, 16, generator=g),
            "feature_BS": feature.view(batch, length),
        },
    }


def model_inputs(batch: dict) -> ModelInputs:
    names = ("input_ids_BS", "is_valid_BS", "is_vision_BS", "images")
    return ModelInputs(*(batch[name] for name in names))


def num_targets(batch: dict) -> int:
    return int((batch["labels_BS"][:, 1:] != -100).sum())


def stock_logits(base: tuple[Path, Path], batch: dict) -> torch.Tensor:
    model = LlavaForConditionalGeneration.from_pretrained(base[0], dtype=torch.float32).eval()
    with torch.no_grad():
        return model(
            batch["input_ids_BS"],
            pixel_values=batch["images"]["pixels"] if batch["is_vision_BS"].any() else None,
            attention_mask=batch["is_valid_BS"].long(),
        ).logits
