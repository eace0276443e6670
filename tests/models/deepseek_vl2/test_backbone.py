"""DeepSeek-VL2-Tiny's folders: shards, what is written back, published counts, refusals."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest

from gemoe_ds.errors import CheckpointError
from gemoe_ds.models.deepseek_vl2.backbone import DeepseekVl2Backbone
from gemoe_ds.models.deepseek_vl2.model import DeepseekVl2Config
from tests.models.deepseek_vl2.small import (
    CONFIG,
    LAYERS,
    TOP_K,
    changed,
    make,
)
from tests.models.small import check_shards, check_written_back


def test_each_rank_holds_its_own_experts_and_every_shared_one(folder):
    check_shards(partial(make, folder), 4)
    layers = make(folder).moe_layers
    assert len(layers) == LAYERS - 1 and all(layer.shared is not None for layer in layers)


def test_what_was_trained_goes_back_into_the_public_layout(folder, tmp_path):
    model = make(folder, train="all")
    check_written_back(model, folder, tmp_path, ("attn_pool",))


def test_full_shape_has_the_published_number_of_parameters():
    """3,370,501,440 in 2,582 tensors: what is held, and the pooling head that is not used."""
    shapes = {n: tuple(p.shape) for n, p in DeepseekVl2Backbone.published().named_parameters()}
    stored = DeepseekVl2Backbone.keys.stored_shapes(shapes)
    pool = DeepseekVl2Backbone.published_unused
    assert sum(math.prod(shape) for shape in pool.values()) == 15_238_352
    stored |= pool
    assert sum(math.prod(shape) for shape in stored.values()) == 3_370_501_440
    assert len(stored) == 2582


def test_activated_parameters_are_the_published_ones(folder):
    """0.57 billion of the language model at k = 6, its input embedding left out."""
    config = DeepseekVl2Config()
    expert = 3 * config.d_model * config.expert_width
    model = make(folder)
    small = 3 * 32 * 16
    all_but = model.num_parameters - 2 * (8 - TOP_K) * small
    assert model.activated_parameters([TOP_K] * 2) == all_but
    language = sum(
        p.numel()
        for n, p in DeepseekVl2Backbone.published().named_parameters()
        if n.startswith(("language_model.layers", "language_model.norm", "lm_head"))
    )
    assert round((language - 11 * 58 * expert) / 1e6, 1) == 574.1


@pytest.mark.parametrize(
    "config, words",
    [
        (changed(use_mla=True), "latent attention"),
        (changed(norm_topk_prob=True), "norm_topk_prob=True, Tiny has False"),
        (changed(num_key_value_heads=1), "num_key_value_heads"),
        (changed(hidden_size=None), "config.json"),
        (CONFIG | {"tile_tag": "1D"}, "tile_tag=1D, Tiny has 2D"),
        (CONFIG | {"global_view_pos": "tail"}, "global_view_pos=tail, Tiny has head"),
        (CONFIG | {"candidate_resolutions": [[384, 384]]}, r"candidate_resolutions=\[\[384, 384"),
        (CONFIG | {"model_type": "deepseek_v2"}, "model_type 'deepseek_v2'"),
        ({"model_type": "deepseek_vl_v2"}, "config.json"),
    ],
)
def test_other_models_are_refused(tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        make(tmp_path)
