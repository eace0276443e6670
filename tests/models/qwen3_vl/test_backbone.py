"""Qwen3-VL-MoE from a folder in its public layout: the formulas, the stock model, the counts."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen3VLMoeForConditionalGeneration

from gemoe_ds.errors import CheckpointError
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.models.qwen3_vl.backbone import Qwen3VLBackbone
from gemoe_ds.models.qwen3_vl.images import rotary_positions
from tests.models import reference
from tests.models.qwen3_vl.small import (
    DIM,
    EPS,
    HEADS,
    IMAGE,
    KV_HEADS,
    LAYERS,
    TOP_K,
    looked_up,
    write_qwen3_vl,
)
from tests.models.small import check_shards, check_written_back, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_qwen3_vl(tmp_path_factory.mktemp("qwen"))


make = partial(make_model, "qwen3_vl_moe")


@pytest.fixture(scope="module")
def rope_index(folder):
    return make(folder).hf.model.get_rope_index


def dummy_images(shape):
    return {
        "pixels": torch.zeros(16, 3 * 2 * 2 * 2),
        "feature_BS": torch.full(shape, -1),
    } | looked_up([1, 4, 4])


def logits_of(model, ids_BS, valid_BS, images):
    with torch.no_grad():
        hidden = model.eval().hidden(
            ModelInputs(ids_BS, valid_BS, images["feature_BS"] >= 0, images)
        )
        return model.backbone.head(model.hf)(hidden)


def test_text_is_that_of_the_formulas(folder):
    """Grouped queries, norms per head, positions by halves, renormalised top-k."""
    ids = torch.randint(0, 29, (1, 9), generator=torch.Generator().manual_seed(1))
    ours = logits_of(make(folder), ids, ids >= 0, dummy_images(ids.shape))[0]
    all_weights = reference.read(folder)
    weights = reference.under(all_weights, "model.language_model.")
    x = weights["embed_tokens.weight"][ids[0]]
    for layer in range(LAYERS):
        w = reference.under(weights, f"layers.{layer}.")
        h = reference.rms_norm(x, w["input_layernorm.weight"], EPS)
        q, k, v = ((h @ w[f"self_attn.{n}_proj.weight"].t()).view(len(x), -1, DIM) for n in "qkv")
        q = reference.rms_norm(q, w["self_attn.q_norm.weight"], EPS)
        k = reference.rms_norm(k, w["self_attn.k_norm.weight"], EPS)
        shared = HEADS // KV_HEADS
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        a = reference.causal_attention(reference.rotated(q, 5e6), reference.rotated(k, 5e6), v)
        x = x + a @ w["self_attn.o_proj.weight"].t()
        h = reference.rms_norm(x, w["post_attention_layernorm.weight"], EPS)
        experts = {"gate.weight": w["mlp.gate.weight"]}
        for e in range(8):
            gate, up = w["mlp.experts.gate_up_proj"][e].t().chunk(2)  # stored [in, gate and up]
            experts[f"experts.{e}.gate_proj.weight"] = gate
            experts[f"experts.{e}.up_proj.weight"] = up
            experts[f"experts.{e}.down_proj.weight"] = w["mlp.experts.down_proj"][e].t()
        x = x + reference.moe(h, experts, TOP_K, norm_topk_prob=True)
    x = reference.rms_norm(x, weights["norm.weight"], EPS)
    reference.assert_same(ours, x @ all_weights["lm_head.weight"].t())


@pytest.fixture(scope="module")
def batch():
    """Text with two images, of 4 x 8 and 4 x 2 patches; text alone, shorter; text with one."""
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 29, (3, 19), generator=g)
    feature = torch.full((3, 19), -1)
    ids[0, 1:15] = torch.tensor([31, *[IMAGE] * 8, 32, 31, *[IMAGE] * 2, 32])
    feature[0, [*range(2, 10), 12, 13]] = torch.arange(10)
    ids[2, 3:9] = torch.tensor([31, *[IMAGE] * 4, 32])
    feature[2, 4:8] = torch.arange(10, 14)
    lengths = torch.tensor([19, 6, 12])
    images = {
        "pixels": torch.randn(32 + 8 + 16, 3 * 2 * 2 * 2, generator=g),
        "feature_BS": feature,
    } | looked_up([1, 4, 8], [1, 4, 2], [1, 4, 4])
    return ids, torch.arange(19) < lengths[:, None], images


def test_images_are_those_of_the_stock_model(folder, batch):
    """Features in place, DeepStack's in the first layers, positions in three dimensions."""
    ids, valid, images = batch
    stock = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = stock(
            ids,
            attention_mask=valid.long(),
            pixel_values=images["pixels"],
            image_grid_thw=images["grid_thw"],
            mm_token_type_ids=(ids == IMAGE).int(),
        ).logits
    ours = logits_of(make(folder), ids, valid, images)
    reference.assert_same(ours[valid], expected[valid])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_positions_are_those_of_transformers(rope_index, seed):
    """Ragged sequences of text and pictures, padded on either side; one may be padding alone."""
    draw = random.Random(seed)
    sequences, grids = [], []
    for _ in range(draw.randint(1, 4)):
        ids: list[int] = []
        for _ in range(draw.randint(0, 3)):
            ids += [1] * draw.randint(0, 4)
            grids.append([1, 2 * draw.randint(1, 4), 2 * draw.randint(1, 4)])
            ids += [31, *[IMAGE] * (grids[-1][1] * grids[-1][2] // 4), 32]
        sequences.append(ids + [2] * draw.randint(0 if ids else 1, 3))
    length = max(map(len, sequences))
    left = draw.random() < 0.5
    pads = [[0] * (length - len(ids)) for ids in sequences]
    ids_BS = torch.tensor([p + s if left else s + p for s, p in zip(sequences, pads, strict=True)])
    valid_BS = ids_BS != 0
    is_image_BS = ids_BS == IMAGE
    feature_BS = torch.full_like(ids_BS, -1)
    feature_BS[is_image_BS] = torch.arange(int(is_image_BS.sum()))
    places = looked_up(*(grids or [[1, 2, 2]]))["place_F3"]
    wanted, _ = rope_index(
        ids_BS,
        is_image_BS.long(),
        image_grid_thw=torch.tensor(grids) if grids else None,
        attention_mask=valid_BS,
    )
    assert rotary_positions(feature_BS, valid_BS, places).tolist() == wanted.tolist()


def test_a_picture_through_its_layout(folder):
    """From pixels to logits: what the layout makes is what the model takes."""
    model = make(folder)
    image = model.image_layout(Image.new("RGB", (9, 12), (200, 10, 90)))
    assert image.num_features == 6 and image.extras["grid_thw"].tolist() == [[1, 6, 4]]
    ids = torch.tensor([[*image.input_ids, 1, 2, 3]])
    feature = torch.full_like(ids, -1)
    feature[0, : len(image.feature_P)] = torch.from_numpy(image.feature_P)
    images = {
        "pixels": torch.from_numpy(image.pixels),
        "feature_BS": feature,
    } | {name: torch.from_numpy(extra) for name, extra in image.extras.items()}
    assert logits_of(model, ids, ids >= 0, images).isfinite().all()
    assert model.image_layout.token == ("<|image_pad|>", IMAGE)


def test_a_folder_without_its_processor_is_refused(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(CheckpointError, match="preprocessor_config.json"):
        make(tmp_path)


def test_each_rank_holds_its_own_experts_only(folder):
    check_shards(partial(make, folder), 4)


def test_what_was_trained_goes_back_into_the_public_layout(folder, tmp_path):
    model = make(folder, train="all")
    check_written_back(model, folder, tmp_path)


def test_text_alone_trains_the_routers(folder):
    model = make(folder, "gemoe")
    ids = torch.randint(0, 29, (2, 7))
    valid = torch.ones_like(ids, dtype=torch.bool)
    model(ids, ids, valid, ~valid, dummy_images(ids.shape))["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trainable().values())


def test_full_shape_has_the_published_number_of_parameters():
    """31,070,754,032 with 3,353,032,704 of the language model active at top-8."""
    model = Qwen3VLBackbone.published()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == 31_070_754_032
    blocks = Qwen3VLBackbone(Qwen3VLBackbone.Config()).moe_blocks(model)
    assert len(blocks) == 48
    language = sum(size for name, size in sizes.items() if ".visual." not in name)
    idle = sum((128 - 8) * block.params_per_expert for block in blocks)
    assert language - idle == 3_353_032_704
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    stored = Qwen3VLBackbone.keys.stored_shapes(shapes)
    experts = "model.language_model.layers.0.mlp.experts."
    assert stored[f"{experts}gate_up_proj"] == (128, 2048, 1536)
    assert stored[f"{experts}down_proj"] == (128, 768, 2048)
