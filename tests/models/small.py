"""Small folders and models of every backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.moe.router import Router


def write_random(shapes: Mapping[str, tuple[int, ...]], folder: Path, std: float = 0.3) -> Path:
    """Random tensors of these keys and shapes, norms about 1."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in shapes.items():
        tensors[key] = torch.randn(shape, generator=generator) * std
        if ("norm" in key or "ln_" in key) and key.endswith("weight"):
            tensors[key] += 1
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_model(
    name: str,
    folder: Path,
    router: str = "top_k",
    shard: ExpertShard | None = None,
    *,
    backbone: Mapping[str, object] | None = None,
    **options: object,
) -> MoEModel:
    """The model of backbone `name` in a folder; `backbone` are the backbone's own options."""
    chosen, family = Router.named(router), Backbone.named(name)
    torch.manual_seed(0)
    return MoEModel.from_checkpoint(
        family(family.Config(**(backbone or {}))),
        folder,
        folder,
        (chosen, chosen.Config()),
        shard=shard,
        **options,
    )


def check_shards(make: Callable[..., MoEModel], ranks: int) -> None:
    """Each of so many ranks holds its own two experts of every layer, and whatever is shared."""
    whole = make()
    for rank in range(ranks):
        part = make(shard=ExpertShard(rank, ranks))
        for mine, all_ in zip(part.moe_layers, whole.moe_layers, strict=True):
            local = slice(2 * rank, 2 * rank + 2)
            assert torch.equal(mine.experts.gate_up_EGD, all_.experts.gate_up_EGD[local])
            assert torch.equal(mine.experts.down_EDF, all_.experts.down_EDF[local])
            assert torch.equal(mine.router.gate.weight, all_.router.gate.weight)
            if all_.shared is not None:
                for a, b in zip(mine.shared.parameters(), all_.shared.parameters(), strict=True):
                    assert torch.equal(a, b)


def check_written_back(
    model: MoEModel, folder: Path, out: Path, unused: tuple[str, ...] = ()
) -> None:
    """What was trained goes back into the public layout; tensors with `unused` in the key stay."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    state = model.stock_tensors({n: p.detach() for n, p in model.named_parameters()})
    model.backbone.save_trained(model.hf, state, folder, out)
    before, after = (load_file(f / "model.safetensors") for f in (folder, out))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        expected = tensor if any(part in key for part in unused) else tensor + 0.01
        torch.testing.assert_close(after[key], expected, msg=key)


def noise(width: int, height: int) -> Image.Image:
    """A picture whose every pixel matters, the same for the same size."""
    rng = np.random.default_rng(width * 10_000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
