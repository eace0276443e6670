"""The same experts stored in every way that folders have them, for every backbone."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

import tests.models.qwen3_vl.small as qwen3_vl
from gemoe_ds.errors import CheckpointError
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.models.upcycled.model import UpcycledLlavaForConditionalGeneration
from gemoe_ds.moe.router import Router
from tests.models.cases import CASES, write_case
from tests.models.upcycled.small import write_dense

TOP_K = (Router.named("top_k"), Router.named("top_k").Config())
LAYOUTS = ("per expert", "fused", "transposed")
MATRICES = {"moe_llava_qwen": ("w2", "w1", "c_proj")}
USUAL = ("gate_proj", "up_proj", "down_proj")


def make(name, folder, **options):
    backbone = Backbone.named(name)
    return MoEModel.from_checkpoint(backbone(backbone.Config()), folder, folder, TOP_K, **options)


def tensors_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def experts_of(name, tensors):
    """Where experts are -> gate [E, F, D], up [E, F, D], down [E, D, F]; and all other tensors."""
    experts, rest = {}, {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.*experts)\.(\d+)\.(\w+)\.weight", key)
        if match and "shared" not in key:
            of_expert = experts.setdefault(match[1], {}).setdefault(int(match[2]), {})
            of_expert[match[3]] = tensor
        elif match := re.fullmatch(r"(.*experts)\.(gate_up|down)_proj", key):
            experts.setdefault(match[1], {})[match[2]] = tensor.transpose(1, 2)
        else:
            rest[key] = tensor
    found = {}
    for place, stored in experts.items():
        if "down" in stored:
            found[place] = (*stored["gate_up"].chunk(2, dim=1), stored["down"])
        else:
            found[place] = tuple(
                torch.stack([stored[e][m] for e in range(len(stored))])
                for m in MATRICES.get(name, USUAL)
            )
    return found, rest


def laid(name, tensors, layout):
    """The same tensors with experts in another layout, by hand."""
    experts, found = experts_of(name, tensors)
    for place, (gate, up, down) in experts.items():
        if layout == "per expert":
            for matrix, of_all in zip(MATRICES.get(name, USUAL), (gate, up, down), strict=True):
                for e, weight in enumerate(of_all):
                    found[f"{place}.{e}.{matrix}.weight"] = weight
        else:
            both = torch.cat([gate, up], 1)
            turn = layout == "transposed"
            found[f"{place}.gate_up_proj"] = both.transpose(1, 2) if turn else both
            found[f"{place}.down_proj"] = down.transpose(1, 2) if turn else down
    return found


def write(folder, like, tensors):
    folder.mkdir()
    for path in like.glob("*.json"):
        if "index" not in path.name:
            shutil.copy(path, folder)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_every_layout_is_the_same_model(name, tmp_path):
    base, _ = write_case(name, tmp_path)
    whole, tensors = make(name, base), tensors_of(base)
    for layout in LAYOUTS:
        folder = write(tmp_path / layout, base, laid(name, tensors, layout))
        for rank in range(2):
            part = make(name, folder, shard=ExpertShard(rank, 2))
            for mine, all_ in zip(part.moe_layers, whole.moe_layers, strict=True):
                half = all_.router.spec.num_experts // 2
                local = slice(half * rank, half * (rank + 1))
                assert torch.equal(mine.experts.gate_up_EGD, all_.experts.gate_up_EGD[local])
                assert torch.equal(mine.experts.down_EDF, all_.experts.down_EDF[local])


@pytest.mark.parametrize("name", CASES)
def test_export_keeps_the_layout_of_its_base(name, tmp_path):
    base, _ = write_case(name, tmp_path)
    for layout in LAYOUTS:
        tensors = laid(name, tensors_of(base), layout)
        folder = write(tmp_path / layout, base, tensors)
        model = make(name, folder, train="all")
        state = {n: p.detach() + 1 for n, p in model.named_parameters()}
        out = tmp_path / f"{layout} again"
        model.backbone.save_trained(model.hf, model.stock_tensors(state), folder, out)
        written = load_file(out / "model.safetensors")
        assert written.keys() == tensors.keys()
        trained = {n for n, p in model.hf.named_parameters()}
        assert sum(torch.equal(written[k], tensors[k] + 1) for k in tensors) >= len(trained) / 2
        again = make(name, out)
        for a, b in zip(again.moe_layers, model.moe_layers, strict=True):
            assert torch.equal(a.experts.gate_up_EGD, b.experts.gate_up_EGD + 1)
            assert torch.equal(a.experts.down_EDF, b.experts.down_EDF + 1)


def test_what_transformers_saves_of_qwen3_vl(tmp_path):
    """It turns the public experts round when it saves."""
    base, _ = write_case("qwen3_vl_moe", tmp_path)
    stock = Qwen3VLMoeForConditionalGeneration.from_pretrained(base)
    stock.save_pretrained(tmp_path / "saved")
    shutil.copy(base / "preprocessor_config.json", tmp_path / "saved")
    saved, public = tensors_of(tmp_path / "saved"), tensors_of(base)
    key = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(saved[key], public[key].transpose(1, 2))
    ours = make("qwen3_vl_moe", tmp_path / "saved")
    for layer, block in zip(ours.moe_layers, stock.model.language_model.layers, strict=True):
        assert torch.equal(layer.experts.gate_up_EGD, block.mlp.experts.gate_up_proj)
        assert torch.equal(layer.experts.down_EDF, block.mlp.experts.down_proj)


@pytest.mark.parametrize("width", [16, 32])
def test_a_square_matrix_is_turned_as_its_partner_is(width, tmp_path, monkeypatch):
    """Width 16 of D = 32 makes gate_up_proj square, 32 down_proj: alone they fit both ways."""
    monkeypatch.setitem(qwen3_vl.CONFIG["text_config"], "moe_intermediate_size", width)
    base, _ = write_case("qwen3_vl_moe", tmp_path)
    whole = make("qwen3_vl_moe", base)
    for layout in LAYOUTS:
        tensors = laid("qwen3_vl_moe", tensors_of(base), layout)
        read = make("qwen3_vl_moe", write(tmp_path / layout, base, tensors))
        for a, b in zip(read.moe_layers, whole.moe_layers, strict=True):
            assert torch.equal(a.experts.gate_up_EGD, b.experts.gate_up_EGD)
            assert torch.equal(a.experts.down_EDF, b.experts.down_EDF)


@pytest.mark.parametrize("name", ["moe_llava_qwen", "qwen3_vl_moe"])
def test_a_mixture_of_layouts_is_refused(name, tmp_path):
    base, _ = write_case(name, tmp_path)
    number = 4 if name == "moe_llava_qwen" else 8
    fused, turned, single = (
        laid(name, tensors_of(base), layout) for layout in ("fused", "transposed", "per expert")
    )
    down = {k: t for k, t in turned.items() if k.endswith("experts.down_proj")}
    folder = write(tmp_path / "turned", base, fused | down)
    with pytest.raises(CheckpointError, match=r"experts\.\w+_proj has shape"):
        make(name, folder)
    folder = write(tmp_path / "both", base, fused | single)
    with pytest.raises(CheckpointError, match="unexpected: .*experts"):
        make(name, folder)
    gone = {k: t[:-1] if ".experts." in k else t for k, t in fused.items()}
    folder = write(tmp_path / "gone", base, gone)
    with pytest.raises(CheckpointError, match=rf"gate_up_proj has shape \[{number - 1}, "):
        make(name, folder)


def test_a_missing_expert_is_named_in_its_own_layout(tmp_path):
    base, _ = write_case("qwen3_vl_moe", tmp_path)
    tensors = laid("qwen3_vl_moe", tensors_of(base), "per expert")
    del tensors["model.language_model.layers.1.mlp.experts.5.up_proj.weight"]
    folder = write(tmp_path / "less", base, tensors)
    with pytest.raises(CheckpointError, match=r"missing: .*layers.1.mlp.experts.5.up_proj.weight"):
        make("qwen3_vl_moe", folder)


def test_ranks_share_the_experts_of_a_folder_that_is_upcycled_already(tmp_path):
    """Rank 1 once got the experts of rank 0: its rows are a part of one stored tensor."""
    torch.manual_seed(0)
    stock = UpcycledLlavaForConditionalGeneration.from_dense(
        LlavaForConditionalGeneration.from_pretrained(write_dense(tmp_path / "dense")),
        {"layers": [1, 2], "num_experts": 4, "top_k": 2, "norm_topk_prob": True},
    )
    for layer in (1, 2):
        torch.nn.init.normal_(stock.model.language_model.layers[layer].mlp.experts.down_proj)
    stock.save_pretrained(tmp_path / "up")
    for rank in range(2):
        part = make("upcycled", tmp_path / "up", shard=ExpertShard(rank, 2))
        for layer, mine in zip((1, 2), part.moe_layers, strict=True):
            whole = stock.model.language_model.layers[layer].mlp.experts.down_proj
            assert torch.equal(mine.experts.down_EDF, whole[2 * rank : 2 * rank + 2])
