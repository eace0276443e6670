"""DeepSeek-VL2-Tiny by formulas: tower, connector, text."""

from __future__ import annotations

import torch

from gemoe_ds.models.inputs import ModelInputs
from tests.models import reference
from tests.models.deepseek_vl2.small import (
    HEADS,
    LAYERS,
    SIDE,
    TOP_K,
    VISION_HEADS,
    VISION_LAYERS,
    VOCABULARY,
    make,
)

EPS = 1e-6


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
        ours = model.hf.image_features({"pixels": pixels, "tiles": torch.tensor([2, 3])})
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
        features = model.hf.image_features({"pixels": pixels, "tiles": tiles})
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
