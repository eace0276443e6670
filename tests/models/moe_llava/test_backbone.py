"""MoE-LLaVA's folders: shards, a tower of its own, what is written back, refusals."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel

from gemoe_ds.errors import CheckpointError, ConfigError
from gemoe_ds.models.backbone import Backbone
from tests.models.moe_llava.small import (
    CONFIGS,
    NAMES,
    SHARED,
    make,
)
from tests.models.small import check_shards, check_written_back


def test_each_rank_holds_its_own_experts_only(case):
    assert len(make(*case).moe_layers) == 2
    check_shards(partial(make, *case), 2)


def test_what_was_trained_goes_back_into_the_public_layout(case, tmp_path):
    _, folder = case
    check_written_back(make(*case, train="all"), folder, tmp_path, ("position_ids",))


def without_tower(case, folder):
    name, whole = case
    folder.mkdir()
    (folder / "config.json").write_text((whole / "config.json").read_text())
    tensors = load_file(whole / "model.safetensors")
    kept = {k: t for k, t in tensors.items() if "image_tower" not in k}
    save_file(kept, folder / "model.safetensors")
    return name, folder


def test_a_tower_of_its_own_folder(case, tmp_path):
    """The same model from two folders; what trained goes back into the one without it, and the
    tower into what is written: that folder is whole."""
    name, folder = without_tower(case, tmp_path / "bare")
    with pytest.raises(ConfigError, match="has no image tower; give the folder"):
        make(name, folder)
    whole = make(*case)
    CLIPVisionModel.save_pretrained(whole.hf.vision_tower, tmp_path / "clip")
    model = make(name, folder, vision_tower=str(tmp_path / "clip"))
    for (n, a), (_, b) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(a, b), n
    state = {k: t + 1 for k, t in model.hf.named_parameters() if k.endswith("lm_head.weight")}
    (tmp_path / "out").mkdir()
    model.backbone.save_trained(model.hf, state, folder, tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (case[1], tmp_path / "out"))
    assert before.keys() - after.keys() == {k for k in before if k.endswith("position_ids")}
    assert torch.equal(after.pop("lm_head.weight"), before["lm_head.weight"] + 1)
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())
    (tmp_path / "clip/config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="model.backbone.vision_tower="):
        make(name, folder, vision_tower=str(tmp_path / "clip"))


def test_a_part_of_a_tower_is_refused(case, tmp_path):
    name, folder = without_tower(case, tmp_path / "bare")
    tensors = load_file(folder / "model.safetensors")
    whole = load_file(case[1] / "model.safetensors")
    key = next(k for k in whole if k.endswith("layers.1.mlp.fc2.weight"))
    save_file(tensors | {key: whole[key]}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing: .*image_tower"):
        make(name, folder)


@pytest.mark.parametrize("name, total", [("stablelm", 2_890_321_920), ("qwen", 3_054_323_712)])
def test_language_models_have_the_published_number_of_parameters(name, total):
    """At the true shapes, without tower and projector."""
    model = Backbone.named(f"moe_llava_{name}").published()
    assert sum(p.numel() for p in model.language_model.parameters()) == total


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "moe_llava_phi"}, "model_type 'moe_llava_phi'"),
        ({"image_projector_type": "linear"}, "projector 'linear'"),
        ({"mm_image_tower": "google/siglip-so400m-patch14-384"}, "only CLIP"),
        ({"mm_vision_select_layer": -1}, "mm_vision_select_layer=-1"),
        (
            {"moe": SHARED["moe"] | {"num_experts": [4, 8]}},
            r"=\[4, 8\]: the same number",
        ),
        ({"moe": SHARED["moe"] | {"num_experts": [-1, -1]}}, r"num_experts=\[-1, -1\]"),
        ({"moe": SHARED["moe"] | {"moe_layers_idx": [0, 9]}}, "there are 3 layers"),
        ({"num_hidden_layers": 1}, "there are 1 layers"),
        ({"moe": SHARED["moe"] | {"use_residual": True}}, "residual"),
        ({"moe": None}, "config.json"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_other_models_are_refused(name, tmp_path, change, words):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name] | change))
    with pytest.raises(CheckpointError, match=words):
        make(name, tmp_path)
