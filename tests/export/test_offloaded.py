"""`device_map`: weights that are kept elsewhere give the numbers that they give in memory."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights
from transformers import OlmoeForCausalLM

from gemoe_ds.export.offloaded import device_of
from tests.export.loaded import batches, load, logits

REST = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def places(elsewhere: str) -> dict[str, str]:
    """The first layer in memory, the second one elsewhere."""
    return dict.fromkeys(REST, "cpu") | {"model.layers.0": "cpu", "model.layers.1": elsewhere}


@DTYPES
def test_experts_on_disk_are_fetched(olmoe_folder, tmp_path, dtype):
    whole = load(olmoe_folder, dtype=dtype)
    options = {"device_map": places("disk"), "offload_folder": tmp_path, "dtype": dtype}
    model = load(olmoe_folder, **options)
    assert any(p.is_meta for p in model.parameters())
    batch = batches()[0]
    for _ in range(2):
        torch.testing.assert_close(logits(model, batch), logits(whole, batch), rtol=0, atol=0)
        assert all(map(torch.equal, model.k_per_layer, whole.k_per_layer))
    assert any(p.is_meta for p in model.parameters()), "and let go of"
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**batch, **asked), whole.generate(**batch, **asked))


def test_all_but_the_head_may_be_on_disk(olmoe_folder, tmp_path):
    options = {"device_map": {"model": "disk", "lm_head": "cpu"}, "offload_folder": tmp_path}
    batch = batches()[0]
    found = logits(load(olmoe_folder, **options), batch)
    torch.testing.assert_close(found, logits(load(olmoe_folder), batch), rtol=0, atol=0)


def test_routers_that_are_offloaded_too_are_refused(olmoe_folder):
    model = cpu_offload(load(olmoe_folder), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="nothing fetches them: offload by device_map"):
        logits(model, batches()[0])


def test_weights_that_nobody_fetches_are_refused(olmoe_folder):
    config = load(olmoe_folder).config
    with init_empty_weights():
        empty = OlmoeForCausalLM(config)
    with pytest.raises(ValueError, match="OlmoeExperts are on the meta device.*device_map"):
        device_of(empty.model.layers[0].mlp.experts)
