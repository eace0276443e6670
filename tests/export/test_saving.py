"""What `save_pretrained` of an exported model writes loads as the exported folder does."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, OlmoeForCausalLM, Trainer, TrainingArguments

from tests.export.families import write_exported
from tests.export.loaded import batches, load, logits

INDEX = "model.safetensors.index.json"


def check(saved, exported):
    """Weights without routers, an index of them, the same routers and the same architecture."""
    config, before = (json.loads((f / "config.json").read_text()) for f in (saved, exported))
    assert config.get("architectures") == before.get("architectures")
    assert config["gemoe"] == before["gemoe"]
    stored = {k: f.name for f in saved.glob("model*.safetensors") for k in load_file(f)}
    assert stored == json.loads((saved / INDEX).read_text())["weight_map"]
    assert stored.keys() == json.loads((exported / INDEX).read_text())["weight_map"].keys()
    routers = [load_file(folder / "routers.safetensors") for folder in (saved, exported)]
    torch.testing.assert_close(*routers, rtol=0, atol=0)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_the_same_when_loaded(olmoe_folder, tmp_path, dtype, shards):
    model, batch = load(olmoe_folder, dtype=dtype), batches()[0]
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    for _ in range(2):
        model.save_pretrained(tmp_path / "saved", **shards)
    check(tmp_path / "saved", olmoe_folder)
    again = load(tmp_path / "saved", dtype=dtype)
    assert type(again).__name__ == type(model).__name__
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert all(map(torch.equal, again.k_per_layer, model.k_per_layer))
    stock, report = OlmoeForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    assert torch.equal(stock.lm_head.weight, model.lm_head.weight.to(stock.dtype))


@pytest.mark.parametrize("name", ["upcycled", "qwen3_vl_moe"])
def test_so_is_one_that_sees(name, tmp_path):
    exported = write_exported(name, tmp_path).folder
    read, trust = AutoModelForImageTextToText.from_pretrained, {"trust_remote_code": True}
    model, batch = read(exported, **trust).eval(), batches()[0]
    batch["input_ids"] = batch["input_ids"].clamp(max=20)
    model.save_pretrained(tmp_path / "saved")
    check(tmp_path / "saved", exported)
    again = read(tmp_path / "saved", **trust).eval()
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_a_checkpoint_of_a_trainer_loads(olmoe_folder, tmp_path):
    model = load(olmoe_folder)
    ids = batches()[0]["input_ids"]
    options = TrainingArguments(
        tmp_path / "run", max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model=model, args=options, train_dataset=data)
    trainer.train()
    check(tmp_path / "run/checkpoint-2", olmoe_folder)
    batch = batches()[1]
    wanted = logits(model.eval(), batch)
    assert torch.equal(logits(load(tmp_path / "run/checkpoint-2"), batch), wanted)


def test_what_would_leave_the_routers_out_is_refused(olmoe_folder, tmp_path):
    model = load(olmoe_folder)
    with pytest.raises(ValueError, match=r"push_to_hub=True .* then model.push_to_hub\(NAME\)"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    state = {k: v for k, v in model.state_dict().items() if ".gemoe." not in k}
    with pytest.raises(ValueError, match=r"state_dict has no model.layers.0.mlp.gemoe.router.\*"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert not any(tmp_path.iterdir())


def test_other_ranks_write_nothing(olmoe_folder, tmp_path):
    load(olmoe_folder).save_pretrained(tmp_path, is_main_process=False)
    assert not any(tmp_path.iterdir())
