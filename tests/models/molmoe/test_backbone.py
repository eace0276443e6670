"""MolmoE-1B's folders: shards, what is written back, published counts, refusals."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest

from gemoe_ds.errors import CheckpointError
from gemoe_ds.models.molmoe.backbone import MolmoeBackbone
from tests.models.molmoe.small import CONFIG, make
from tests.models.small import check_shards, check_written_back


def test_each_rank_holds_its_own_experts_only(folder):
    check_shards(partial(make, folder), 4)


def test_crops_are_an_option(folder):
    backbone = MolmoeBackbone(MolmoeBackbone.Config(max_crops=36))
    assert backbone.image_layout(backbone.load(folder, folder)).max_crops == 36


def test_what_was_trained_goes_back_into_the_public_layout(folder, tmp_path):
    model = make(folder, train="all")
    check_written_back(model, folder, tmp_path, ("new_embedding", "resblocks.22"))


def test_full_shape_has_the_published_number_of_parameters():
    """7,221,875,712 in the folder: what is held, the unused rows and the unused layer."""
    held = sum(p.numel() for p in MolmoeBackbone.published().parameters())
    layer = 4 * (1024 * 1024 + 1024) + 2 * 4096 * 1024 + 4096 + 1024 + 4 * 1024
    unused = sum(math.prod(shape) for shape in MolmoeBackbone.published_unused.values())
    assert unused == 128 * 2048 + layer
    assert held + unused == 7_221_875_712


@pytest.mark.parametrize(
    "change, words",
    [
        ({"moe_num_experts": 0}, "a dense Molmo"),
        ({"model_type": "llama"}, "model_type 'llama', backbone 'molmoe' has 'molmo'"),
        ({"weight_tying": True}, "weight_tying=True, backbone 'molmoe' has False"),
        ({"n_kv_heads": 1}, "n_kv_heads=1"),
        ({"rope_impl": "interleave"}, "rope_impl=interleave, backbone 'molmoe' has llama"),
        ({"moe_dropless": False}, "moe_dropless=False, backbone 'molmoe' has True"),
        ({"activation_type": "gelu"}, "activation_type=gelu, backbone 'molmoe' has swiglu"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"image_pooling_2d": "attention"}, "has attention-meanq"),
        ({"d_model": None}, "config.json"),
    ],
)
def test_other_models_are_refused(tmp_path, change, words):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(CheckpointError, match=words):
        make(tmp_path)
