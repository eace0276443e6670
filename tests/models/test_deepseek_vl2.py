"""DeepSeek-VL2-Tiny from a folder in its public layout: tower, connector, text by formulas."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch

import gemoe_ds.routers  # noqa: F401  (registers every router)
from gemoe_ds.errors import CheckpointError
from gemoe_ds.hf_io.hf_config import meta_model
from gemoe_ds.models.deepseek_vl2.backbone import DeepseekVl2Backbone
from gemoe_ds.models.deepseek_vl2.model import DeepseekVl2Config, DeepseekVl2Model
from gemoe_ds.models.inputs import ModelInputs
from tests.models import reference
from tests.models.small import check_shards, check_written_back, make_model, write_random

VOCABULARY, LAYERS, HEADS, TOP_K, EPS, VISION_LAYERS, VISION_HEADS = 40, 3, 2, 3, 1e-6, 2, 2
SIDE = 5  # patches: odd, as in the public model
CONFIG = {  # the public file's keys
    "model_type": "deepseek_vl_v2",
    "tile_tag": "2D",
    "global_view_pos": "head",
    "language_config": {
        "model_type": "deepseek_v2",
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "intermediate_size": 48,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": TOP_K,
        "n_shared_experts": 2,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "use_mla": False,
        "q_lora_rank": None,
        "kv_lora_rank": None,
        "torch_dtype": "bfloat16",
    },
    "vision_config": {
        "layers": VISION_LAYERS,
        "width": 16,
        "heads": VISION_HEADS,
        "mlp_ratio": 1.5,
        "image_size": 14 * SIDE,
    },
    "projector_config": {"n_embed": 32},
}


def changed(**changes):
    return CONFIG | {"language_config": CONFIG["language_config"] | changes}


def write_deepseek_vl2(folder, vocabulary=None):
    """All keys of the public folder, those that nobody reads included, with random weights."""
    config = changed(vocab_size=max(vocabulary.values()) + 1 if vocabulary else VOCABULARY)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    model = meta_model(DeepseekVl2Model, DeepseekVl2Config.from_json(config))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    stored = DeepseekVl2Backbone.keys.stored_shapes(shapes)
    stored["vision.attn_pool.latent"] = (1, 1, 16)
    return write_random(stored, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_deepseek_vl2(tmp_path_factory.mktemp("deepseek_vl2"))


make = partial(make_model, "deepseek_vl2")


def features_by_hand(w, pixels_CHW):
    """One tile: blocks of the tower, then neighbours two by two through the projector."""

    def norm(x, name):
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)

    def linear(x, name):
        return x @ w[f"{name}.weight"].t() + w[f"{name}.bias"]

    kernel = w["vision.patch_embed.proj.weight"]
    patches = [
        (kernel * pixels_CHW[:, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14]).sum((1, 2, 3))
        for y in range(SIDE)
        for x in range(SIDE)
    ]
    x = torch.stack(patches) + w["vision.patch_embed.proj.bias"] + w["vision.pos_embed"][0]
    for layer in range(VISION_LAYERS):
        b = f"vision.blocks.{layer}."
        q, k, v = linear(norm(x, f"{b}norm1"), f"{b}attn.qkv").chunk(3, dim=-1)
        q, k, v = (reference.heads(t, VISION_HEADS) for t in (q, k, v))
        scores = torch.einsum("shd,thd->hst", q, k) / q.shape[-1] ** 0.5
        a = torch.einsum("hst,thd->shd", scores.softmax(-1), v).flatten(1)
        x = x + linear(a, f"{b}attn.proj")
        h = linear(norm(x, f"{b}norm2"), f"{b}mlp.fc1")
        h = torch.nn.functional.gelu(h, approximate="tanh")
        x = x + linear(h, f"{b}mlp.fc2")
    x = norm(x, "vision.norm")
    rows = []
    for y in range(0, SIDE, 2):
        for c in range(0, SIDE, 2):
            joined = x.new_zeros(4 * 16)
            for dy in range(2):
                for dx in range(2):
                    if y + dy < SIDE and c + dx < SIDE:
                        joined[2 * dy + dx :: 4] = x[(y + dy) * SIDE + c + dx]
            h = torch.nn.functional.gelu(linear(joined, "projector.layers.0"))
            rows.append(linear(h, "projector.layers.2"))
    return torch.stack(rows)


def test_image_features_are_those_of_the_formulas(folder):
    """Two images of two and three tiles; each ends with its newline and its separator."""
    model = make(folder)
    pixels = torch.randn(5, 3, 70, 70, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model.hf.image_features(pixels, torch.tensor([2, 3]))
    weights = reference.read(folder)
    tiles = [features_by_hand(weights, p) for p in pixels.double()]
    ends = [weights["image_newline"][None], weights["view_seperator"][None]]
    expected = torch.cat([*tiles[:2], *ends, *tiles[2:], *ends])
    assert expected.shape == (5 * 9 + 4, 32)
    scale = expected.abs().max()
    reference.assert_same(ours / scale, expected / scale)


def logits_by_hand(weights, x):
    for layer in range(LAYERS):
        w = reference.under(weights, f"language.model.layers.{layer}.")
        h = reference.rms_norm(x, w["input_layernorm.weight"], EPS)
        q, k, v = (reference.heads(h @ w[f"self_attn.{n}_proj.weight"].t(), HEADS) for n in "qkv")
        a = reference.causal_attention(reference.rotated(q, 1e4), reference.rotated(k, 1e4), v)
        x = x + a @ w["self_attn.o_proj.weight"].t()
        h = reference.rms_norm(x, w["post_attention_layernorm.weight"], EPS)
        mlp = reference.under(w, "mlp.")
        names = [f"{part}_proj.weight" for part in ("gate", "up", "down")]
        if layer == 0:
            x = x + reference.swiglu(h, *(mlp[n] for n in names))
        else:
            shared = reference.swiglu(h, *(mlp[f"shared_experts.{n}"] for n in names))
            x = x + reference.moe(h, mlp, TOP_K, norm_topk_prob=False) + shared
    x = reference.rms_norm(x, weights["language.model.norm.weight"], EPS)
    return x @ weights["language.lm_head.weight"].t()


def test_logits_with_features_are_those_of_the_formulas(folder):
    """Two sequences, the second shorter and with features in another order."""
    model = make(folder).eval()
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (2, 9), generator=g)
    feature = torch.full((2, 9), -1)
    feature[0, 2:5] = torch.tensor([3, 9, 10])
    feature[1, 1:4] = torch.tensor([20, 12, 19])
    pixels, tiles = torch.randn(2, 3, 70, 70, generator=g), torch.tensor([1, 1])
    images = {"pixels": pixels, "tiles": tiles, "feature_BS": feature}
    valid = torch.arange(9) < torch.tensor([9, 6])[:, None]
    with torch.no_grad():
        features = model.hf.image_features(pixels, tiles)
        hidden = model.hidden(ModelInputs(ids, valid, feature >= 0, images))
        ours = model.backbone.head(model.hf)(hidden)
    weights = reference.read(folder)
    for row, length in ((0, 9), (1, 6)):
        embedded = weights["language.model.embed_tokens.weight"][ids[row, :length]].clone()
        for place in range(length):
            if feature[row, place] >= 0:
                embedded[place] = features[feature[row, place]]
        expected = logits_by_hand(weights, embedded)
        reference.assert_same(ours[row, :length], expected)


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
