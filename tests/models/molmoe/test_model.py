"""MolmoE-1B by formulas: tower, connector, text."""

from __future__ import annotations

import torch

from gemoe_ds.models.inputs import ModelInputs
from tests.models import reference
from tests.models.molmoe.small import HEADS, LAYERS, TOP_K, VISION_HEADS, VOCABULARY, make

EPS = 1e-5


def tower_by_hand(weights, pixels_CHW):
    """Outputs of every block: [577-like tokens, width], the input of block 0 first."""
    w = reference.under(weights, "model.vision_backbone.image_vit.")
    side = pixels_CHW.shape[1] // 14
    patches = [
        pixels_CHW[:, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14].permute(1, 2, 0).flatten()
        for y in range(side)
        for x in range(side)
    ]
    x = torch.stack(patches) @ w["patch_embedding.weight"].t()
    x = torch.cat([w["class_embedding"][None], x]) + w["positional_embedding"]

    def norm(x, name):
        return torch.nn.functional.layer_norm(
            x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5
        )

    def linear(x, name):
        return x @ w[f"{name}.weight"].t() + w[f"{name}.bias"]

    x = norm(x, "pre_ln")
    outputs = [x]
    for layer in range(2):
        b = f"transformer.resblocks.{layer}."
        h = norm(x, f"{b}attention_norm")
        q, k, v = (reference.heads(linear(h, f"{b}attention.w{n}"), VISION_HEADS) for n in "qkv")
        scores = torch.einsum("shd,thd->hst", q, k) / q.shape[-1] ** 0.5
        a = torch.einsum("hst,thd->shd", scores.softmax(-1), v).flatten(1)
        x = x + linear(a, f"{b}attention.wo")
        h = linear(norm(x, f"{b}ffn_norm"), f"{b}feed_forward.w1")
        x = x + linear(h * torch.sigmoid(1.702 * h), f"{b}feed_forward.w2")
        outputs.append(x)
    return outputs


def features_by_hand(weights, pixels_CHW, mask_P):
    """One crop, patch by patch and window by window."""
    outputs = tower_by_hand(weights, pixels_CHW)
    x = torch.cat([outputs[2][1:], outputs[1][1:]], dim=-1)
    pad = weights["model.vision_backbone.pad_embed"]
    x = torch.stack(
        [
            row + (pad[0] if m == 0 else pad[1] if m < 1 else 0)
            for row, m in zip(x, mask_P, strict=True)
        ]
    )
    w = reference.under(weights, "model.vision_backbone.image_pooling_2d.")
    p = reference.under(weights, "model.vision_backbone.image_projector.")

    def linear(x, name):
        return x @ w[f"{name}.weight"].t() + w[f"{name}.bias"]

    rows, side = [], 12
    for y in range(0, side, 2):
        for c in range(0, side, 2):
            four = x[[y * side + c, y * side + c + 1, (y + 1) * side + c, (y + 1) * side + c + 1]]
            q = reference.heads(linear(four.mean(0), "wq"), VISION_HEADS)
            k, v = (reference.heads(linear(four, n), VISION_HEADS) for n in ("wk", "wv"))
            attention = (torch.einsum("hd,thd->ht", q, k) / q.shape[-1] ** 0.5).softmax(-1)
            pooled = linear(torch.einsum("ht,thd->hd", attention, v).flatten(), "wo")
            gate = p["w1.weight"] @ pooled
            rows.append(p["w2.weight"] @ (gate * gate.sigmoid() * (p["w3.weight"] @ pooled)))
    return torch.stack(rows)


def test_image_features_are_those_of_the_formulas(folder):
    model = make(folder)
    g = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 168, 168, generator=g)
    mask = torch.rand(3, 144, generator=g)
    mask[mask < 0.3] = 0
    mask[mask > 0.7] = 1
    mask[2] = -1
    with torch.no_grad():
        ours = model.hf.image_features({"pixels": pixels, "mask": mask})
    weights = reference.read(folder)
    expected = torch.cat(
        [features_by_hand(weights, p, m) for p, m in zip(pixels.double(), mask, strict=True)]
    )
    scale = expected.abs().max()
    reference.assert_same(ours / scale, expected / scale)


def logits_by_hand(weights, embedded):
    x = embedded
    for layer in range(LAYERS):
        w = reference.under(weights, f"model.transformer.blocks.{layer}.")
        h = reference.rms_norm(x, w["attn.attn_norm.weight"], EPS)
        q, k, v = (h @ w["attn.att_proj.weight"].t()).chunk(3, dim=-1)
        q = reference.rms_norm(q, w["attn.q_norm.weight"], EPS)
        k = reference.rms_norm(k, w["attn.k_norm.weight"], EPS)
        q, k, v = (reference.heads(t, HEADS) for t in (q, k, v))
        a = reference.causal_attention(reference.rotated(q, 1e4), reference.rotated(k, 1e4), v)
        x = x + a @ w["attn.attn_out.weight"].t()
        h = reference.rms_norm(x, w["mlp.ff_norm.weight"], EPS)
        x = x + reference.moe(h, reference.under(w, "mlp."), TOP_K, norm_topk_prob=False)
    x = reference.rms_norm(x, weights["model.transformer.ln_f.weight"], EPS)
    return x @ weights["lm_head.weight"].t()


def test_logits_with_added_features_are_those_of_the_formulas(folder):
    """Two sequences, the second shorter and with features in another order."""
    model = make(folder).eval()
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (2, 9), generator=g)
    feature = torch.full((2, 9), -1)
    feature[0, 2:5] = torch.tensor([3, 0, 7])
    feature[1, 1:4] = torch.tensor([40, 36, 71])
    images = {
        "pixels": torch.randn(2, 3, 168, 168, generator=g),
        "mask": torch.ones(2, 144),
        "feature_BS": feature,
    }
    valid = torch.arange(9) < torch.tensor([9, 6])[:, None]
    with torch.no_grad():
        features = model.hf.image_features(images)
        hidden = model.hidden(ModelInputs(ids, valid, feature >= 0, images))
        ours = model.backbone.head(model.hf)(hidden)
    weights = reference.read(folder)
    for row, length in ((0, 9), (1, 6)):
        embedded = weights["model.transformer.wte.embedding"][ids[row, :length]].clone()
        for place in range(length):
            if feature[row, place] >= 0:
                embedded[place] += features[feature[row, place]]
        expected = logits_by_hand(weights, embedded)
        reference.assert_same(ours[row, :length], expected)
