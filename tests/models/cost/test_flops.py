"""The count of operations against torch's own counter, over every backbone."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.cost.flops import flops_per_token
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.moe.router import Router
from tests.models.cases import CASES

LENGTH = 24
PRODUCTS = {  # of which torch's counter does not know
    torch.ops.mkldnn._linear_pointwise: (
        lambda rows, weight, *_, out_shape: 2 * rows[0] * weight[0] * weight[1]
    ),
    torch.ops.aten._grouped_mm: (
        lambda rows, weights, *_, out_shape: 2 * rows[0] * weights[1] * weights[2]
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("router_name", ["top_k", "gemoe"])
def test_flops_are_those_that_torch_counts(name, router_name, folders):
    backbone, router = Backbone.named(name), Router.named(router_name)
    base = folders(name)
    torch.manual_seed(0)
    model = MoEModel.from_checkpoint(
        backbone(backbone.Config()), *base, (router, router.Config())
    ).eval()
    ids = torch.randint(6, 26, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    valid, vision = torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids).bool()
    model.ctx.trace = True
    # attention spelled out, whose products the counter sees whatever the kernel would have been
    text = model.hf.get_submodule(model.block_paths[0].partition(".layers.")[0])
    text.config._attn_implementation = "eager"
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter:
        hidden = model.hidden(ModelInputs(ids, valid, vision))
        model.backbone.head(model.hf)(hidden)
    mean_k = [float(record.k_T.float().mean()) for record in model.ctx.layers]
    flops = flops_per_token(model, mean_k, context=LENGTH)
    assert router_name == "top_k" or min(mean_k) < model.routing[0].top_k
    rotary = counter.get_total_flops() / LENGTH - sum(flops.values())
    # rotary angles are a small matrix product in some models: half a head's width a token
    assert 0 <= rotary <= 2 * 3 * 64, (flops, counter.get_total_flops() / LENGTH)
