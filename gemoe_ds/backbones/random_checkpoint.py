"""A checkpoint at a published model's true shape, in its public layout, with random weights.

Where the public weights cannot be had, memory and time can still be measured on the real path.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from gemoe_ds.backbones.backbone import Backbone
from gemoe_ds.backbones.stored import INDEX

_NOISE = 2**27  # numbers that all weights are cut from: drawing billions takes minutes


def write_random_checkpoint(backbone: type[Backbone], folder: Path, *, shards: int) -> None:
    """Weights of standard deviation 0.02 and norms of 1 in bfloat16; config.json comes last."""
    model = backbone.published()
    ours = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shapes = backbone.keys.stored_shapes(ours)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_NOISE, generator=generator).mul_(0.02).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    keys, weight_map = list(shapes), {}
    size = -(-len(keys) // shards)
    for number in tqdm(range(shards), desc="writing", unit="shard", dynamic_ncols=True):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {}
        for place, key in enumerate(keys[number * size : (number + 1) * size]):
            items = torch.Size(shapes[key]).numel()
            start = min(4096 * place, max(0, _NOISE - items))
            weight = noise[start : start + items].repeat(-(-items // _NOISE))[:items]
            if "norm" in key and key.endswith("weight"):
                weight = torch.ones_like(weight)
            tensors[key] = weight.view(shapes[key]).clone()
            weight_map[key] = name
        save_file(tensors, folder / name, metadata={"format": "pt"})
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(folder)  # type: ignore[operator, union-attr]
