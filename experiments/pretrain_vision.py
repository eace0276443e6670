"""Pretrain a small vision tower on captions; a fresh `tiny` backbone starts from it.

python -m experiments.pretrain_vision experiments/recipes/demo_pretrain.yaml --out runs/demo/vision
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from gemoe_ds.config import load_config
from gemoe_ds.console import Progress
from gemoe_ds.data.images import decode_image
from gemoe_ds.data.mixture import SampleList, open_training
from gemoe_ds.errors import ConfigError, DataError, exit_on_error
from gemoe_ds.files import whole_folder
from gemoe_ds.hf_io.quiet import without_bars
from gemoe_ds.models.images import stretched
from gemoe_ds.parser import Parser


def caption_words(samples: SampleList, kind: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 pixels [N, 3, size, size] of the captioned samples, and bool words [N, V]."""
    pixels, captions = [], []
    for index in Progress(range(len(samples)), desc="decoding", unit="image"):
        sample = samples[index]
        texts = [answer.content for answer in sample.answers if answer.kind == kind]
        if sample.images and texts:
            pixels.append(torch.from_numpy(stretched(decode_image(sample), size).copy()))
            captions.append(set(re.findall(r"\w+", " ".join(texts).lower())))
    if not captions:
        raise DataError(f"{samples.path}: no sample has an image and a turn of kind {kind!r}")
    counts = Counter(word for caption in captions for word in caption)
    vocabulary = sorted(w for w, n in counts.items() if 0.001 < n / len(captions) < 0.99)
    words = torch.tensor([[word in caption for word in vocabulary] for caption in captions])
    return torch.stack(pixels), words


def main(argv: list[str]) -> None:
    parser = Parser(
        "python -m experiments.pretrain_vision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="of the backbone that will use the tower")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--kind", default="caption", help="kind of the turns that are captions")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    arguments = parser.parse_or_exit(argv)
    with exit_on_error():
        config = load_config(arguments.recipe, arguments.overrides)
        backbone = config.model.backbone
        if not hasattr(backbone.backbone_class, "vision_config"):
            raise ConfigError(f"backbone {backbone.name!r} brings a pretrained vision tower")
        from gemoe_ds.models.tiny.vision import train_tower

        made: Any = backbone.backbone_class(backbone.config)
        vision = made.vision_config()
        samples = open_training(config.data.train_path)
        pixels, words = caption_words(samples, arguments.kind, vision.image_size)
        print(f"{len(pixels)} captions, {words.shape[1]} words")
        tower = train_tower(
            vision,
            pixels,
            words,
            steps=arguments.steps,
            batch=arguments.batch,
            lr=arguments.lr,
            seed=config.seed,
        )
        with whole_folder(arguments.out) as folder, without_bars():
            tower.save_pretrained(folder)
        print(f"saved {arguments.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
