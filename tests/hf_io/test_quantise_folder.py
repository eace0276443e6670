"""`gemoe export --quantise`: folders in few bits that are read as what they stand for."""

from __future__ import annotations

import json
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gemoe_ds.cli import export
from gemoe_ds.errors import CheckpointError
from gemoe_ds.hf_io import quantise_folder
from gemoe_ds.models.few_bits import format_of
from gemoe_ds.models.quantised_linear import QuantisedLinear
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.moe.experts.quantised import QuantisedWeight
from tests.helpers import repository
from tests.models.cases import write_case
from tests.models.test_quantised import load

REST = {"int8": "int8", "nf4": "int8", "float8": "float8"}


def write_quantised(name: str, root, of_experts: str):
    """root/other has it as its base."""
    backbone = load(name, root, None).backbone
    model = backbone.load(root / "base", root / "tokenizer")
    other = root / "other"
    backbone.save_quantised(
        model, {}, root / "base", other / "base", format_of(backbone, model, of_experts)
    )
    (other / "tokenizer").symlink_to((root / "tokenizer").resolve())
    return other


def weights_of(model):
    """Every tensor by name, those in few bits as scales and numbers."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, weight in model.named_modules():
        if isinstance(weight, QuantisedWeight):
            places = range(weight.shape[0]) if len(weight.shape) == 3 else (slice(None),)
            whole = [weight.dequantised(place, torch.float32) for place in places]
            found[f"{name}.codes_EMC"] = torch.stack(whole)
    return found


CASES = [
    ("olmoe", "nf4", ExpertShard()),
    ("olmoe", "int8", ExpertShard(1, 2)),
    ("qwen3_vl_moe", "nf4", ExpertShard(1, 2)),
    ("deepseek_vl2", "int8", ExpertShard()),
    ("molmoe", "nf4", ExpertShard(0, 2)),
    ("moe_llava_qwen", "int8", ExpertShard()),
]


@pytest.mark.parametrize("name, of_experts, shard", CASES)
def test_what_was_quantised_before_is_read_to_the_same_codes(tmp_path, name, of_experts, shard):
    write_case(name, tmp_path)
    options = {"shard": shard, "dense_dtype": REST[of_experts]}
    wanted = load(name, tmp_path, of_experts, **options)
    found = load(name, write_quantised(name, tmp_path, of_experts), of_experts, **options)
    assert any(isinstance(module, QuantisedLinear) for module in found.modules())
    tensors = weights_of(wanted)
    assert weights_of(found).keys() == tensors.keys()
    for key, tensor in weights_of(found).items():
        assert torch.equal(tensor, tensors[key]), key


@pytest.mark.parametrize("of_experts", REST)
def test_it_is_also_read_as_the_numbers_that_it_stands_for(tmp_path, of_experts):
    """Into no format, and into another one."""
    write_case("olmoe", tmp_path)
    other = write_quantised("olmoe", tmp_path, of_experts)
    whole = load("olmoe", other, None)
    codes = load("olmoe", other, of_experts)
    for layer, exact in zip(codes.moe_layers, whole.moe_layers, strict=True):
        for name in ("gate_up_EGD", "down_EDF"):
            for expert, weight in enumerate(getattr(exact.experts, name)):
                found = getattr(layer.experts, name).dequantised(expert, torch.float32)
                assert torch.equal(found, weight)
    for key, weight in load("olmoe", tmp_path, None).named_parameters():
        found = dict(whole.named_parameters())[key]
        error = (found - weight).abs().max()
        assert error <= weight.abs().max() * 0.04, key
    again = load("olmoe", other, "int8" if of_experts != "int8" else "nf4")
    assert not torch.equal(
        again.moe_layers[0].experts.gate_up.scales_EMB[..., 0],
        codes.moe_layers[0].experts.gate_up.scales_EMB[..., 0],
    )


def test_a_float8_folder_is_read_by_transformers(tmp_path):
    """As the numbers that we read."""
    write_case("olmoe", tmp_path)
    other = write_quantised("olmoe", tmp_path, "float8")
    config = json.loads((other / "base/config.json").read_text())["quantization_config"]
    kept = {"lm_head", "model.embed_tokens", "model.layers.0.mlp.gate", "model.norm"}
    assert kept < {*config["modules_to_not_convert"]} and config["quant_method"] == "fp8"
    theirs = AutoModelForCausalLM.from_pretrained(other / "base", dtype=torch.float32)
    ours = load("olmoe", other, None)
    stored, mine = theirs.state_dict(), dict(ours.hf.named_parameters())
    for path, layer in zip(ours.block_paths, ours.moe_layers, strict=True):
        mine[f"{path}.experts.gate_up_proj"] = layer.experts.gate_up_EGD
        mine[f"{path}.experts.down_proj"] = layer.experts.down_EDF
        mine[f"{path}.gate.weight"] = mine.pop(f"{path}.router.gate.weight")
    assert stored.keys() <= mine.keys()
    for key, weight in stored.items():
        assert torch.equal(mine[key].to(weight.dtype), weight), key


def test_codes_that_stay_as_they_are_are_not_listed_as_whole(tmp_path):
    """The linear maps of a float8 folder, where the experts alone are asked for."""
    write_case("olmoe", tmp_path)
    first = write_quantised("olmoe", tmp_path, "float8") / "base"
    backbone = load("olmoe", tmp_path, None).backbone
    model = backbone.load(first, tmp_path / "tokenizer")
    formats = {n: f for n, f in format_of(backbone, model, "float8").items() if "experts" in n}
    backbone.save_quantised(model, {}, first, tmp_path / "again", formats)
    before, after = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (first, tmp_path / "again")
    )
    assert after == before


def test_what_is_ours_alone_transformers_refuses(tmp_path):
    """And does not take codes for weights."""
    write_case("olmoe", tmp_path)
    other = write_quantised("olmoe", tmp_path, "int8")
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(other / "base", dtype=torch.float32)


@pytest.mark.parametrize("to", REST)
@pytest.mark.parametrize("of", ["nf4", "float8"])
def test_a_folder_in_few_bits_goes_into_others(tmp_path, of, to):
    write_case("olmoe", tmp_path)
    first = write_quantised("olmoe", tmp_path, of)
    second = write_quantised("olmoe", first, to)
    config = json.loads((second / "base/config.json").read_text())["quantization_config"]
    tensors = {
        k: v for f in (second / "base").glob("*.safetensors") for k, v in load_file(f).items()
    }
    assert config["quant_method"] == ("fp8" if to == "float8" else "gemoe_ds")
    if to == "float8":
        assert not any(one.dtype in (torch.int8, torch.uint8) for one in tensors.values())
        assert tensors["lm_head.weight"].dtype == (torch.bfloat16 if of == "nf4" else torch.float32)
    wanted, found = (
        weights_of(load("olmoe", root, to, dense_dtype=REST[to])) for root in (first, second)
    )
    for key, weight in wanted.items():
        assert (found[key] - weight).abs().max() <= 0.08 * weight.abs().max() + 1e-9, key


@pytest.mark.parametrize("sizes", [{"moe_intermediate_size": 13}, {"moe_intermediate_size": 65}])
@pytest.mark.parametrize("of_experts", ["nf4", "int8"])
def test_exchanged_experts_of_odd_widths(tmp_path, sizes, of_experts):
    """Whose codes would share bytes in nf4: these stay as they are stored."""
    write_case("qwen3_vl_moe", tmp_path, **sizes)
    other = write_quantised("qwen3_vl_moe", tmp_path, of_experts)
    found, plain = (load("qwen3_vl_moe", root, None) for root in (other, tmp_path))
    for layer, exact in zip(found.moe_layers, plain.moe_layers, strict=True):
        down, whole = layer.experts.down_EDF, exact.experts.down_EDF
        assert torch.equal(down, whole) == (of_experts == "nf4")
        assert (down - whole).abs().max() <= 0.01 * whole.abs().max()
    load("qwen3_vl_moe", other, of_experts)


def test_a_format_of_a_later_version_is_refused(tmp_path):
    write_case("olmoe", tmp_path)
    path = write_quantised("olmoe", tmp_path, "int8") / "base/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["formats"] = ["int3", "int8"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has the formats int3; float8, int8, nf4 are known"):
        load("olmoe", tmp_path / "other", "int8")


def test_what_no_weight_is_is_refused_before_it_is_hidden_in_codes(tmp_path):
    write_case("olmoe", tmp_path)
    key = "model.layers.0.mlp.experts.0.up_proj.weight"
    index = json.loads((tmp_path / "base/model.safetensors.index.json").read_text())
    file = tmp_path / "base" / index["weight_map"][key]
    tensors = load_file(file)
    tensors[key][1, 2] = torch.nan
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"{key} holds NaN or infinite numbers"):
        write_quantised("olmoe", tmp_path, "nf4")


def test_files_have_a_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(quantise_folder, "_SHARD", 10_000)
    write_case("olmoe", tmp_path)
    other = write_quantised("olmoe", tmp_path, "nf4")
    files = sorted((other / "base").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = load_file(file)
        assert sum(one.nbytes for one in tensors.values()) <= 10_000 or len(tensors) == 1
    load("olmoe", other, "nf4")


def test_the_command_writes_a_base_that_trains(tmp_path, capsys, monkeypatch):
    write_case("olmoe", tmp_path)
    recipe = repository() / "gemoe_ds/recipes/olmoe_gemoe_8_gpus.yaml"
    options = [f"model.checkpoint={tmp_path / 'base'}", f"data.tokenizer={tmp_path / 'tokenizer'}"]
    options += ["data.train_path=x", "output_dir=x"]
    out = tmp_path / "other/base"
    command = [str(recipe), *options, "--quantise", "nf4", "--out", str(out)]
    full = SafetensorError("I/O error: No space left on device (os error 28)")
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(quantise_folder, "save_file", Mock(side_effect=full))
        export.main(command)
    assert f"error: {out} cannot be written: I/O error: No space" in capsys.readouterr().err
    export.main(command)
    assert f"wrote {out}" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    said = {"quant_method": "gemoe_ds", "formats": ["int8", "nf4"]}
    assert config["quantization_config"] == said
    (tmp_path / "other/tokenizer").symlink_to(tmp_path / "tokenizer")
    load("olmoe", tmp_path / "other", "nf4", dense_dtype="int8")


def test_scales_that_do_not_fit_are_named(tmp_path):
    write_case("olmoe", tmp_path)
    other = write_quantised("olmoe", tmp_path, "nf4")
    (file,) = (other / "base").glob("*.safetensors")
    tensors = load_file(file)
    key = "model.layers.0.mlp.experts.0.up_proj.weight"
    scales = tensors[f"{key}_scale"]
    for harm, words in (
        (torch.ones(3, 1), rf"{key}_scale is float32 \[3, 1\]; for blocks of 64 inputs of {key}"),
        (scales[0], rf"{key}_scale is float32 \[1\]"),
        (scales.bfloat16(), "it would be float32"),
        (torch.full_like(scales, torch.nan), "holds NaN or infinite numbers"),
        (torch.full_like(scales, 3e38).fill_(torch.inf), "holds NaN or infinite numbers"),
        (-scales, "has scales below zero"),
        (None, f"{key} is stored in uint8 without {key}_scale"),
    ):
        harmed = {k: v for k, v in tensors.items() if k != f"{key}_scale"}
        if harm is not None:
            harmed[f"{key}_scale"] = harm.contiguous()
        save_file(harmed, file)
        index = other / "base/model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": dict.fromkeys(harmed, file.name)}))
        with pytest.raises(CheckpointError, match=words):
            load("olmoe", other, "nf4")
