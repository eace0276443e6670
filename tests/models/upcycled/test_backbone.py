"""A dense LLaVA becomes a MoE one: the same outputs at the start, drawn by the seed alone."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from gemoe_ds.errors import CheckpointError, ConfigError
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.models.upcycled.model import UpcycledLlavaForConditionalGeneration
from gemoe_ds.train.assemble import build_model
from tests.models.upcycled.small import (
    LAYERS,
    dense_logits,
    load,
    logits_of,
    make_config,
    write_dense,
)
from tests.tiny import random_batch


@pytest.mark.parametrize("top_k", [2, 4])
def test_copies_with_weights_that_sum_to_one_are_the_dense_model(setting, top_k):
    batch = random_batch(3)
    model = load(setting, top_k=top_k)
    assert [block for block in model.block_paths if "layers.0" in block or "layers.2" in block]
    assert len(model.moe_layers) == LAYERS // 2, "every other layer"
    valid = batch["is_valid_BS"]
    torch.testing.assert_close(
        logits_of(model, batch)[valid], dense_logits(setting, batch)[valid], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("train", ["routers", "experts"])
def test_what_is_drawn_depends_on_the_seed_alone(setting, tmp_path, train):
    """Not on the shard, the dtype, or what the process has drawn before."""
    router = {"name": "gemoe", "monotonic_weight": 0, "k_high": 4}
    drawn = []
    for seed, ranks, dtype in ((0, 1, "float32"), (0, 2, "bfloat16"), (1, 1, "float32")):
        torch.rand(7)
        config = make_config(setting, tmp_path, router, 1, 0, trainable=train, dtype=dtype)
        model = build_model(config.model_copy(update={"seed": seed}), ExpertShard(ranks - 1, ranks))
        drawn.append([t for layer in model.moe_layers for t in layer.router.parameters()])
    first, sharded, other = drawn
    assert all(torch.equal(a, b) for a, b in zip(first, sharded, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_needs_a_dense_model(setting):
    with pytest.raises(ConfigError, match="starts from a dense model"):
        load(setting, None)
    with pytest.raises(ConfigError, match=r"first=9: .* has 4 layers"):
        load(setting, first=9)
    with pytest.raises(ConfigError, match="top_k=5 exceeds num_experts=4"):
        load(setting, top_k=5)


def test_other_ffns_are_refused(setting, tmp_path):
    folder = write_dense(tmp_path / "biased", mlp_bias=True)
    with pytest.raises(CheckpointError, match="SwiGLU FFNs without biases"):
        load(setting | {"biased": folder}, "biased")


@pytest.mark.parametrize("norm", ["norm_topk_prob", "renormalise"])  # the latter until 0.1
def test_an_upcycled_folder_brings_its_own_shape(setting, tmp_path, norm):
    model = UpcycledLlavaForConditionalGeneration.from_dense(
        LlavaForConditionalGeneration.from_pretrained(setting["dense"], dtype=torch.float32),
        {"layers": [1], "num_experts": 3, "top_k": 1, norm: True},
    )
    model.save_pretrained(tmp_path / "up")
    loaded = load(setting, tmp_path / "up")
    assert [(spec.num_experts, spec.norm_topk_prob) for spec in loaded.routing] == [(3, True)]
    with pytest.raises(ConfigError, match=r"num_experts=4, but .* is upcycled already, with 3"):
        load(setting, tmp_path / "up", num_experts=4)
    with pytest.raises(ConfigError, match=r"norm_topk_prob=False, but .* already, with True"):
        load(setting, tmp_path / "up", norm_topk_prob=False)
