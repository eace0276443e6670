"""MoE-LLaVA by formulas: both language models and CLIP."""

from __future__ import annotations

import torch

from gemoe_ds.models.inputs import ModelInputs
from tests.models import reference
from tests.models.moe_llava.small import (
    HEADS,
    LAYERS,
    VISION_HEADS,
    VOCABULARY,
    D,
    make,
)


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
        ours = model.hf.image_features({"pixels": pixels})
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
