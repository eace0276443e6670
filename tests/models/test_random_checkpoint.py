"""A random folder of a model's true shape: all that the public one has, and it loads."""

from __future__ import annotations

import pytest
import torch

from gemoe_ds.hf_io.safetensors_reader import open_stored
from gemoe_ds.models import random_checkpoint
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.moe.router import Router
from tests.models.cases import write_case


@pytest.mark.parametrize("name", ["molmoe", "deepseek_vl2"])
def test_it_has_what_nobody_reads_too(name, tmp_path, monkeypatch):
    base, tokenizer = write_case(name, tmp_path)
    backbone, router = Backbone.named(name), Router.named("top_k")
    small = backbone(backbone.Config()).load(base, tokenizer)
    monkeypatch.setattr(random_checkpoint, "_NOISE", 2**12)
    monkeypatch.setattr(backbone, "published", classmethod(lambda cls: small))
    random_checkpoint.write_random_checkpoint(backbone, tmp_path / "out", shards=3)
    keys = open_stored(tmp_path / "out").keys()
    assert backbone.published_unused and backbone.published_unused.keys() <= keys
    assert keys >= {k for k in open_stored(base) if "attn_pool" not in k and ".22." not in k}
    model = MoEModel.from_checkpoint(
        backbone(backbone.Config()), tmp_path / "out", tokenizer, (router, router.Config())
    )
    assert len(model.moe_layers) == 2


@pytest.mark.parametrize(
    "name, float8", [("molmoe", False), ("deepseek_vl2", False), ("qwen3_vl_moe", True)]
)
def test_headers_alone_are_those_of_the_whole_folder(name, float8, tmp_path, monkeypatch):
    base, tokenizer = write_case(name, tmp_path)
    backbone = Backbone.named(name)
    small = backbone(backbone.Config()).load(base, tokenizer)
    monkeypatch.setattr(random_checkpoint, "_NOISE", 2**12)
    monkeypatch.setattr(backbone, "published", classmethod(lambda cls: small))
    found = []
    for write in (random_checkpoint.write_random_checkpoint, random_checkpoint.write_headers):
        write(backbone, folder := tmp_path / write.__name__, shards=3, float8=float8)
        of_files = {t.file.name for t in open_stored(folder).values()}
        stored = {k: (t.file.name, t.shape, t.dtype) for k, t in open_stored(folder).items()}
        rest = {p.name: p.read_text() for p in folder.iterdir() if p.name not in of_files}
        rest.pop("model.safetensors.index.json")  # sizes with headers, which safetensors pads
        found.append((stored, rest))
    assert found[0] == found[1]
    assert "config.json" in found[1][1]


def test_in_float8_experts_are_stored_one_by_one_with_their_scales(tmp_path, monkeypatch):
    base, tokenizer = write_case("qwen3_vl_moe", tmp_path)
    backbone, router = Backbone.named("qwen3_vl_moe"), Router.named("top_k")
    small = backbone(backbone.Config()).load(base, tokenizer)
    monkeypatch.setattr(random_checkpoint, "_NOISE", 2**12)
    monkeypatch.setattr(backbone, "published", classmethod(lambda cls: small))
    random_checkpoint.write_random_checkpoint(backbone, tmp_path / "out", shards=3, float8=True)
    key = "model.language_model.layers.0.mlp.experts.0.down_proj.weight"
    stored = open_stored(tmp_path / "out")
    assert stored[key].dtype == torch.float8_e4m3fn and f"{key}_scale_inv" in stored
    model = MoEModel.from_checkpoint(
        backbone(backbone.Config()), tmp_path / "out", tokenizer, (router, router.Config())
    )
    std = model.moe_layers[0].experts.down_EDF.std()
    assert std == pytest.approx(0.02, rel=0.1)
