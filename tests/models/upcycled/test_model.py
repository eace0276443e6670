"""The exported model class on its own."""

from __future__ import annotations

import torch

from tests.models.upcycled.small import (
    load,
    logits_of,
)
from tests.tiny import random_batch


def test_own_plain_forward_equals_ours(setting):
    """The model class on its own, with gates and experts that differ, against the MoE layers."""
    batch = random_batch(4)
    torch.manual_seed(1)
    model = load(setting)
    plain = model.backbone.load(setting["dense"], setting["tokenizer"]).eval()
    state = {n: torch.randn_like(p) * 0.3 for n, p in model.trainable().items()}
    for name, parameter in model.trainable().items():
        parameter.data.copy_(state[name])
    for name, tensor in model.stock_tensors(state).items():
        plain.get_parameter(name).data.copy_(tensor)
    with torch.no_grad():
        expected = plain(
            batch["input_ids_BS"],
            pixel_values=batch["images"]["pixels"],
            attention_mask=batch["is_valid_BS"].long(),
        ).logits
    valid = batch["is_valid_BS"]
    torch.testing.assert_close(logits_of(model, batch)[valid], expected[valid], rtol=0, atol=1e-5)
