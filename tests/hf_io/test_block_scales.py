"""Folders in float8 with scales for blocks of 128 x 128, in the layout that is published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from gemoe_ds.errors import CheckpointError
from gemoe_ds.hf_io.hf_config import meta_model
from gemoe_ds.hf_io.loader import Weights
from gemoe_ds.hf_io.rewriter import rewrite
from gemoe_ds.models.shard import ExpertShard
from tests.models.cases import write_case
from tests.models.olmoe.small import write_olmoe
from tests.models.test_quantised import load
from tests.tiny import write_tokenizer

KEPT = ("norm", "embed", "lm_head", "mlp.gate.", "visual", "pos_emb")
SECTION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def blocks(shape):
    """The place of every block in the last two dimensions."""
    for row in range(0, shape[-2], 128):
        for column in range(0, shape[-1], 128):
            yield (
                row // 128,
                column // 128,
                (..., slice(row, row + 128), slice(column, column + 128)),
            )


def quantised(weight: torch.Tensor, generator: torch.Generator):
    """Codes, scales, and what they stand for, block by block; 448 is seldom among the codes."""
    *before, rows, columns = weight.shape
    scales = torch.empty(*before, -(-rows // 128), -(-columns // 128))
    codes, there = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    for row, column, place in blocks(weight.shape):
        unused = 1 + torch.rand(before, generator=generator)
        scale = weight[place].abs().amax((-2, -1)) / 448 * unused
        scales[..., row, column] = scale
        codes[place] = (weight[place] / scale[..., None, None]).to(torch.float8_e4m3fn)
        there[place] = codes[place].float() * scale[..., None, None]
    return codes, scales, there


def write_float8(folder: Path, out: Path, twin: Path) -> None:
    """A folder's twin in float8, and the folder that this one stands for."""
    generator = torch.Generator().manual_seed(1)
    for target in (out, twin):
        target.mkdir()
        for path in folder.glob("*.json"):
            (target / path.name).write_text(path.read_text())
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": SECTION}))
    file_of = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored, plain = {}, {}
        for key, tensor in load_file(path).items():
            if tensor.dim() < 2 or any(part in key for part in KEPT):
                stored[key] = plain[key] = tensor
            else:
                parts = quantised(tensor.float(), generator)
                stored[key], stored[f"{key}_scale_inv"], plain[key] = parts
        save_file(stored, out / path.name)
        save_file(plain, twin / path.name)
        file_of |= dict.fromkeys(stored, path.name)
    index = out / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    """Matrices of several blocks, some of them cut off."""
    root = tmp_path_factory.mktemp("olmoe")
    write_tokenizer(root / "tokenizer", ("<|user|>", "<|assistant|>"), {})
    sizes = {"hidden_size": 160, "intermediate_size": 144, "num_experts": 4}
    write_olmoe(root / "plain", std=0.05, **sizes)
    write_float8(root / "plain", root / "base", root / "twin")
    (root / "other").mkdir()
    for name, target in (("base", "twin"), ("tokenizer", "tokenizer")):
        (root / "other" / name).symlink_to(root / target)
    return root


def all_tensors(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("shard", [ExpertShard(), ExpertShard(1, 2)])
def test_it_is_read_as_what_it_stands_for(olmoe, shard):
    found, wanted = (
        all_tensors(load("olmoe", root, None, shard=shard)) for root in (olmoe, olmoe / "other")
    )
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_stacked_experts_have_stacked_scales(tmp_path):
    write_case("qwen3_vl_moe", tmp_path)
    (tmp_path / "base").rename(tmp_path / "plain")
    write_float8(tmp_path / "plain", tmp_path / "base", tmp_path / "twin")
    found = all_tensors(load("qwen3_vl_moe", tmp_path, None))
    (tmp_path / "base").rename(tmp_path / "float8")
    (tmp_path / "twin").rename(tmp_path / "base")
    wanted = all_tensors(load("qwen3_vl_moe", tmp_path, None))
    assert any(key.endswith("gate_up_proj_scale_inv") for key in stored(tmp_path / "float8"))
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    (tmp_path / "base").rename(tmp_path / "twin")
    (tmp_path / "float8").rename(tmp_path / "base")
    kept = load("qwen3_vl_moe", tmp_path, "float8")
    for number, layer in enumerate(kept.moe_layers):
        for ours, name in (("gate_up_EGD", "gate_up_EGD"), ("down_EDF", "down_EDF")):
            weight = getattr(layer.experts, ours)
            path = f"{kept.block_paths[number]}.experts.{name}"
            exact = wanted[f"hf.{path}"]
            for expert, tensor in enumerate(exact):
                assert torch.equal(weight.dequantised(expert, torch.float32), tensor), name


def stored(folder: Path) -> dict[str, torch.Tensor]:
    files = folder.glob("*.safetensors")
    return {key: tensor for path in files for key, tensor in load_file(path).items()}


@pytest.mark.parametrize("shard", [ExpertShard(), ExpertShard(1, 2)])
def test_experts_in_float8_keep_codes_and_scales(olmoe, shard):
    model = load("olmoe", olmoe, "float8", shard=shard)
    twin = load("olmoe", olmoe / "other", None, shard=shard)
    there = stored(olmoe / "base")
    for number, (layer, plain) in enumerate(zip(model.moe_layers, twin.moe_layers, strict=True)):
        for name in ("gate_up_EGD", "down_EDF"):
            weight, exact = getattr(layer.experts, name), getattr(plain.experts, name)
            for expert, tensor in enumerate(exact):
                assert torch.equal(weight.dequantised(expert, torch.float32), tensor)
        first = shard.local(4).start
        key = f"model.layers.{number}.mlp.experts.{first}.up_proj.weight"
        codes = layer.experts.gate_up_EGD.codes_EMC[0, 144:, :160]
        assert torch.equal(codes, there[key].view(torch.uint8))


def test_numbers_are_those_of_transformers():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 256, 384, generator=generator)
    codes, scales, there = quantised(weight, generator)
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scales)
    assert torch.equal(theirs, there)


def test_what_does_not_train_goes_back_as_it_is(olmoe, tmp_path):
    model = load("olmoe", olmoe, None)
    weights = Weights(
        olmoe / "base", model.backbone.keys, meta_model(type(model.hf), model.hf.config)
    )
    gates = {
        n: torch.full(s, 0.5) for n, s in weights.shapes.items() if n.endswith("mlp.gate.weight")
    }
    rewrite(weights, gates, tmp_path / "out")
    before, after = stored(olmoe / "base"), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if key.endswith("mlp.gate.weight"):
            assert (after[key] == 0.5).all()
        else:
            assert after[key].dtype == tensor.dtype
            assert torch.equal(after[key].float(), tensor.float()), key
    name = next(n for n in weights.shapes if n.endswith("q_proj.weight"))
    with pytest.raises(CheckpointError, match="has trained and is stored in few bits"):
        rewrite(weights, {name: torch.zeros(weights.shapes[name])}, tmp_path / "no")


def harmed(olmoe: Path, out: Path, harm) -> Path:
    """The folder in one file, after `harm(tensors, config)`."""
    out.mkdir()
    (out / "tokenizer").symlink_to(olmoe / "tokenizer")
    base = out / "base"
    base.mkdir()
    tensors = stored(olmoe / "base")
    config = json.loads((olmoe / "base/config.json").read_text())
    harm(tensors, config)
    save_file(tensors, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config))
    return out


KEY = "model.layers.0.mlp.experts.1.up_proj.weight"


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda t, c: t.pop(f"{KEY}_scale_inv"), "stored in float8 without .*scale_inv"),
        (
            lambda t, c: t.update({f"{KEY}_scale_inv": torch.ones(3, 2)}),
            r"is float32 \[3, 2\]; for blocks of 128 x 128 .* \[2, 2\]",
        ),
        (
            lambda t, c: t.update({f"{KEY}_scale_inv": torch.ones(2, 2, dtype=torch.int32)}),
            "is int32",
        ),
        (
            lambda t, c: t.update({f"{KEY}_scale_inv": torch.full((2, 2), torch.nan)}),
            "holds NaN or infinite numbers",
        ),
        (
            lambda t, c: t.update(
                {
                    "model.norm.weight": torch.ones(160).to(torch.float8_e4m3fn),
                    "model.norm.weight_scale_inv": torch.ones(()),
                }
            ),
            r"model.norm.weight_scale_inv is float32 \[\]; .* float8_e4m3fn \[160\]",
        ),
        (lambda t, c: t.update({"a_scale_inv": torch.ones(2, 2)}), "unexpected: a_scale_inv"),
        (
            lambda t, c: c["quantization_config"].update(weight_block_size=[64, 64]),
            r"says fp8 with blocks of \[64, 64\]; fp8 with a weight_block_size of \[128, 128\] is "
            "supported",
        ),
        (
            lambda t, c: c["quantization_config"].update(quant_method="gptq"),
            "quantization_config says gptq",
        ),
    ],
)
def test_what_does_not_fit_is_named(olmoe, tmp_path, harm, words):
    with pytest.raises(CheckpointError, match=words):
        load("olmoe", harmed(olmoe, tmp_path / "harmed", harm), None)


def test_a_part_may_be_in_float8_and_the_rest_not(olmoe, tmp_path):
    """Mixed folders are read as they are."""

    def widen(tensors, config):
        codes, scales = tensors[KEY], tensors.pop(f"{KEY}_scale_inv")
        by_row = scales.repeat_interleave(128, 0)[: len(codes)]
        tensors[KEY] = codes.float() * by_row.repeat_interleave(128, 1)[:, : codes.shape[1]]

    found = all_tensors(load("olmoe", harmed(olmoe, tmp_path / "mixed", widen), None))
    for name, tensor in all_tensors(load("olmoe", olmoe, None)).items():
        assert torch.equal(found[name], tensor), name
