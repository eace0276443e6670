"""MoE-LLaVA from folders in their public layouts: both language models and CLIP by formulas."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel

import gemoe_ds.routers  # noqa: F401  (registers every router)
from gemoe_ds.errors import CheckpointError, ConfigError
from gemoe_ds.hf_io.hf_config import meta_model
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.models.moe_llava.images import PaddedSquare
from gemoe_ds.models.moe_llava.model import MoeLlavaModel
from tests.models import reference
from tests.models.small import check_shards, check_written_back, make_model, write_random

D, HEADS, WIDTH, LAYERS, VOCABULARY, VISION_HEADS = 32, 2, 24, 3, 40, 2
SHARED = {
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
    "mm_image_tower": "openai/clip-vit-large-patch14-336",
    "image_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "moe": {
        "moe_mode": "sparse",
        "moe_layers_idx": [0, 2],
        "num_experts": [4, 4],
        "top_k_experts": 2,
        "capacity_factor": 1.5,
        "use_residual": False,
    },
    "vision": {"image_size": 42, "width": 16, "layers": 2, "heads": VISION_HEADS, "ffn": 24},
}
CONFIGS = {
    "moe_llava_stablelm": SHARED
    | {"model_type": "moe_llava_stablelm", "intermediate_size": WIDTH, "rope_pct": 0.25},
    "moe_llava_qwen": SHARED | {"model_type": "moe_llava_qwen", "intermediate_size": 2 * WIDTH},
}
NAMES = list(CONFIGS)


def write_moe_llava(name, folder, vocabulary=None):
    backbone = Backbone.named(name)
    size = max(vocabulary.values()) + 1 if vocabulary else VOCABULARY
    config = CONFIGS[name] | {"vocab_size": size}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    model = meta_model(MoeLlavaModel, backbone.config_class.from_json(config))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    stored = backbone.keys.stored_shapes(shapes)
    prefix = "transformer" if name.endswith("qwen") else "model"
    stored[f"{prefix}.image_tower.image_tower.vision_model.embeddings.position_ids"] = (1, 10)
    return write_random(stored, folder)


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    return request.param, write_moe_llava(request.param, tmp_path_factory.mktemp(request.param))


def make(name, folder, shard=None, vision_tower=None, **options):
    tower = {"vision_tower": vision_tower}
    return make_model(name, folder, shard=shard, backbone=tower, **options)


def layer_norm(x, w, name, eps=1e-5):
    return torch.nn.functional.layer_norm(
        x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps
    )


def linear(x, w, name):
    return x @ w[f"{name}.weight"].t() + w[f"{name}.bias"]


def experts_of(w, names):
    """The reference's names of what is under `deepspeed_moe`."""
    found = {"gate.weight": w["gate.wg.weight"]}
    for e in range(4):
        for ours, theirs in names.items():
            key = f"experts.deepspeed_experts.{e}.{theirs}.weight"
            found[f"experts.{e}.{ours}_proj.weight"] = w[key]
    return found


def stablelm(weights, x):
    """LayerNorm, a rotation of a quarter of each head, biases of q, k and v."""
    for layer in range(LAYERS):
        w = reference.under(weights, f"model.layers.{layer}.")
        h = layer_norm(x, w, "input_layernorm")
        q, k, v = (reference.heads(linear(h, w, f"self_attn.{n}_proj"), HEADS) for n in "qkv")
        turned = D // HEADS // 4
        q, k = (
            torch.cat([reference.rotated(t[..., :turned], 1e4), t[..., turned:]], -1)
            for t in (q, k)
        )
        x = x + reference.causal_attention(q, k, v) @ w["self_attn.o_proj.weight"].t()
        h = layer_norm(x, w, "post_attention_layernorm")
        names = ("gate", "up", "down")
        if layer == 1:
            x = x + reference.swiglu(h, *(w[f"mlp.{n}_proj.weight"] for n in names))
        else:
            moe = reference.under(w, "mlp.deepspeed_moe.")
            experts = experts_of(moe, {n: f"{n}_proj" for n in names})
            x = x + reference.moe(h, experts, 2, norm_topk_prob=True)
    x = layer_norm(x, weights, "model.norm")
    return x @ weights["lm_head.weight"].t()


def qwen(weights, x):
    """RMSNorm, one map for q, k and v; c_proj(w1(x) * silu(w2(x)))."""
    for layer in range(LAYERS):
        w = reference.under(weights, f"transformer.h.{layer}.")
        h = reference.rms_norm(x, w["ln_1.weight"], 1e-6)
        q, k, v = (reference.heads(t, HEADS) for t in linear(h, w, "attn.c_attn").chunk(3, -1))
        q, k = reference.rotated(q, 1e4), reference.rotated(k, 1e4)
        x = x + reference.causal_attention(q, k, v) @ w["attn.c_proj.weight"].t()
        h = reference.rms_norm(x, w["ln_2.weight"], 1e-6)
        names = {"gate": "w2", "up": "w1", "down": "c_proj"}
        if layer == 1:
            x = x + reference.swiglu(h, *(w[f"mlp.{n}.weight"] for n in names.values()))
        else:
            moe = experts_of(reference.under(w, "mlp.deepspeed_moe."), names)
            x = x + reference.moe(h, moe, 2, norm_topk_prob=True)
    x = reference.rms_norm(x, weights["transformer.ln_f.weight"], 1e-6)
    return x @ weights["lm_head.weight"].t()


def features_by_hand(weights, prefix, pixels_CHW):
    """CLIP's first layer only: the last but one of two."""
    w = reference.under(weights, f"{prefix}.image_tower.image_tower.vision_model.")
    kernel = w["embeddings.patch_embedding.weight"]
    x = torch.stack(
        [
            (kernel * pixels_CHW[:, 14 * y : 14 * y + 14, 14 * c : 14 * c + 14]).sum((1, 2, 3))
            for y in range(3)
            for c in range(3)
        ]
    )
    x = torch.cat([w["embeddings.class_embedding"][None], x])
    x = layer_norm(x + w["embeddings.position_embedding.weight"], w, "pre_layrnorm")
    b = reference.under(w, "encoder.layers.0.")
    h = layer_norm(x, b, "layer_norm1")
    q, k, v = (reference.heads(linear(h, b, f"self_attn.{n}_proj"), VISION_HEADS) for n in "qkv")
    scores = torch.einsum("shd,thd->hst", q, k) / q.shape[-1] ** 0.5
    a = torch.einsum("hst,thd->shd", scores.softmax(-1), v).flatten(1)
    x = x + linear(a, b, "self_attn.out_proj")
    h = linear(layer_norm(x, b, "layer_norm2"), b, "mlp.fc1")
    x = x + linear(h * torch.sigmoid(1.702 * h), b, "mlp.fc2")
    p = reference.under(weights, f"{prefix}.mm_projector.image_spatial_proj.")
    return linear(torch.nn.functional.gelu(linear(x[1:], p, "0")), p, "2")


def test_logits_are_those_of_the_formulas(case):
    """Two sequences, the second shorter; features where the image stands."""
    name, folder = case
    model = make(name, folder).eval()
    prefix, by_hand = ("transformer", qwen) if name.endswith("qwen") else ("model", stablelm)
    weights = reference.read(folder)
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (2, 14), generator=g)
    pixels = torch.randn(2, 3, 42, 42, generator=g)
    feature = torch.full((2, 14), -1)
    feature[0, 2:11] = torch.arange(9)
    feature[1, 1:10] = torch.arange(9, 18)
    features = torch.cat([features_by_hand(weights, prefix, p) for p in pixels.double()])
    with torch.no_grad():
        ours = model.hf.image_features(pixels)
        scale = features.abs().max()
        reference.assert_same(ours / scale, features / scale)
        valid = torch.arange(14) < torch.tensor([14, 12])[:, None]
        images = {"pixels": pixels, "feature_BS": feature}
        hidden = model.hidden(ModelInputs(ids, valid, feature >= 0, images))
        logits = model.backbone.head(model.hf)(hidden)
    table = next(t for k, t in weights.items() if "embed_tokens" in k or "wte" in k)
    for row, length in ((0, 14), (1, 12)):
        embedded = table[ids[row, :length]].clone()
        seen = feature[row, :length]
        embedded[seen >= 0] = ours[seen[seen >= 0]].double()  # compared above
        expected = by_hand(weights, embedded)
        reference.assert_same(logits[row, :length], expected)


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
    """The same model from two folders; what trained goes back into the one without it."""
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
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"] + 1)
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


def test_a_picture_stands_in_the_middle_of_clip_s_mean_colour():
    white = Image.new("RGB", (200, 100), (255, 255, 255))
    image = PaddedSquare()(white)
    assert image.pixels.shape == (1, 3, 336, 336) and len(image.input_ids) == 576
    mean, std = (np.array(values)[:, None, None] for values in PaddedSquare().settings.values())
    shown = np.rint((image.pixels[0] * std + mean) * 255)
    assert (shown[:, 100:236] == 255).all()
    assert (shown[:, :70] == np.array([122, 116, 104])[:, None, None]).all()
    assert (shown[:, 266:] == np.array([122, 116, 104])[:, None, None]).all()
