"""The tiny model is the stock transformers model: same logits, same files."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from gemoe_ds.errors import CheckpointError, ConfigError
from gemoe_ds.models.tiny.backbone import TinyBackbone
from tests.tiny import make_model, model_inputs, random_batch, stock_logits


@pytest.mark.parametrize("images", [True, False])
def test_native_routing_reproduces_the_unmodified_model(base, images):
    batch = random_batch(3, images=images)
    model = make_model(base, "top_k").eval()
    with torch.no_grad():
        hidden = model.hidden(model_inputs(batch))
        logits = model.backbone.head(model.hf)(hidden)
    valid = batch["is_valid_BS"]
    torch.testing.assert_close(
        logits[valid], stock_logits(base, batch)[valid], atol=1e-5, rtol=1e-5
    )


def test_saved_model_loads_in_stock_transformers(base, tmp_path):
    model = make_model(base, "top_k", train="all")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    state = model.stock_tensors({n: p.detach() for n, p in model.named_parameters()})
    model.backbone.save_pretrained(model.hf, state, tmp_path / "hf")
    _, report = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    again = make_model((tmp_path / "hf", base[1]), "top_k", train="all")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_wrong_checkpoints_are_refused_in_one_line(base, tmp_path):
    load = TinyBackbone(TinyBackbone.Config()).load
    with pytest.raises(CheckpointError, match=r"no config.json"):
        load(tmp_path, base[1])
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in base[0].iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged|cut short"):
        make_model((broken, base[1]))
    with pytest.raises(ConfigError, match="hidden_size=32, but .* has 16"):
        TinyBackbone(TinyBackbone.Config(hidden_size=32)).load(base[0], base[1])
