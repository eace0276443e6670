#!/usr/bin/env python3
"""The digits of scikit-learn (1,797 real scans of 8 x 8 pixels) as LLaVA-format conversations."""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from data_prep.llava_json import Question, write_splits
from gemoe_ds.console import Progress
from gemoe_ds.errors import exit_on_error
from gemoe_ds.parser import Parser


def questions(digit: int, rng: random.Random) -> list[Question]:
    """What is asked about one digit, in random order."""
    other = rng.randrange(10)
    asked = [
        Question("digit", "What digit is this?", str(digit)),
        Question("parity", "Is it even or odd?", "odd" if digit % 2 else "even"),
        Question("compare", f"Is it larger than {other}?", "yes" if digit > other else "no"),
        Question("arithmetic", "What digit comes next after it?", str((digit + 1) % 10)),
    ]
    rng.shuffle(asked)
    return asked


def picture(pixels: np.ndarray, size: int) -> Image.Image:
    """Grey 0..16 to an RGB image of `size` pixels a side."""
    grey = Image.fromarray((pixels * 255 / 16).astype(np.uint8))
    return grey.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_or_exit(argv)
    rng = random.Random(arguments.seed)
    data = load_digits()
    order = rng.sample(range(len(data.images)), len(data.images))
    items = (
        (
            f"digit_{i:04d}",
            picture(data.images[i], arguments.image_size),
            questions(int(data.target[i]), rng),
        )
        for i in Progress(order, desc="digits", unit="image")
    )
    held_out = len(order) // 10
    sizes = {"test": held_out, "validation": held_out, "train": len(order) - 2 * held_out}
    with exit_on_error():
        write_splits(items, sizes, arguments.out)


if __name__ == "__main__":
    main()
