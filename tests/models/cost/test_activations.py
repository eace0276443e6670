"""What is said to be kept for the backward pass against what autograd keeps."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.cost.activations import StepShape, activation_bytes
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.moe.experts import ffn, onednn, weights
from gemoe_ds.moe.router import Router
from tests.models.cases import CASES

LENGTH, ROWS = 64, 2


def kept_bytes(model, batch, labels) -> int:
    """Memory of all tensors that a forward pass keeps, weights excepted; each piece once."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, or its place is used again
        return tensor

    valid = torch.ones_like(batch, dtype=torch.bool)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch, labels, valid, torch.zeros_like(valid), {})
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("train", ["routers", "experts", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_kept_activations_are_those_of_autograd(name, dtype, train, folders):
    check_kept(name, dtype, train, folders)


@pytest.mark.parametrize("train", ["routers", "experts", "all"])
def test_kept_projections_are_wide_where_bfloat16_has_no_instructions(train, folders, monkeypatch):
    """The experts' products then run in float32; experts count as large here."""
    monkeypatch.setattr(onednn, "_has_bfloat16", lambda: False)
    for module in (ffn, weights):
        monkeypatch.setattr(module, "SMALL_FFN", 0)
    check_kept("olmoe", "bfloat16", train, folders)


def check_kept(name, dtype, train, folders):
    base = folders(name)
    backbone = Backbone.named(name)
    backbone = backbone(backbone.Config())
    router = Router.named("top_k")
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    model = MoEModel.from_checkpoint(
        backbone, *base, (router, router.Config()), train=train, dtype=dtype
    )
    ids = torch.randint(6, 26, (ROWS, LENGTH))
    labels = torch.full_like(ids, -100)
    labels[0, -1] = 5
    meta_model = backbone.load(*base)
    blocks = backbone.moe_blocks(meta_model)
    shape = StepShape(
        tokens=ROWS * LENGTH,
        targets=1,
        itemsize=dtype.itemsize,
        k=blocks[0].routing.top_k,
        train=train,
    )
    parts = activation_bytes(backbone, meta_model, blocks, shape)
    estimate = parts["activations"] + parts["weights cast for the products"]
    measured = kept_bytes(model, ids, labels)
    vocabulary = backbone.head(meta_model).weight.shape[0]
    # casts of what a product reads depend on each model's way of writing its attention
    bound = 0.12 if train == "all" and dtype == torch.bfloat16 else 0.1
    assert estimate == pytest.approx(measured - 4 * vocabulary, rel=bound)
