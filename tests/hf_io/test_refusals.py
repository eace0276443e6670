"""Folders that are wrong in ways a user can meet: one line of what and where, no traceback."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemoe_ds.errors import CheckpointError
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.moe.router import Router
from tests.models.cases import CASES, write_case

TOP_K = (Router.named("top_k"), Router.named("top_k").Config())
INDEX, NORM = "model.safetensors.index.json", "model.norm.weight"
EXPERTS_1 = "model.layers.1.mlp.experts"


def make(name, folder):
    backbone = Backbone.named(name)
    return MoEModel.from_checkpoint(backbone(backbone.Config()), folder, folder, TOP_K)


@pytest.fixture
def folder(tmp_path):
    """OLMoE in one file, without an index."""
    base, _ = write_case("olmoe", tmp_path)
    tensors = {}
    for file in base.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (base / INDEX).unlink()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base


def with_header(change):
    """Rewrite the header, after `change` had the entry of one tensor and all of them."""

    def damage(folder):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        new = change(header[NORM], header)
        text = new if isinstance(new, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return damage


def entry(**values):
    return with_header(lambda tensor, header: tensor.update(values))


def with_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def with_index(change):
    """An index of the one file, as `change` leaves it."""

    def damage(folder):
        keys = load_file(folder / "model.safetensors").keys()
        index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "model.safetensors")}
        new = change(index["weight_map"])
        (folder / INDEX).write_text(new if isinstance(new, str) else json.dumps(index))

    return damage


def stale_file(folder):
    """Two models in one folder."""
    shutil.copy(folder / "model.safetensors", folder / "new.safetensors")
    index = dict.fromkeys(load_file(folder / "model.safetensors"), "new.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))


HEADERS = [
    (entry(shape=[32.0]), r"norm.weight has the shape \[32.0\]"),
    (entry(shape=[-1, -32]), r"norm.weight has the shape \[-1, -32\]"),
    (entry(shape="ab"), "norm.weight has the shape ab"),
    (entry(shape=[[32]]), r"norm.weight has the shape \[\[32\]\]"),
    (entry(data_offsets=[0.0, 128.0]), r"norm.weight has the offsets \[0.0, 128.0\]"),
    (entry(data_offsets=[0]), r"norm.weight has the offsets \[0\]"),
    (entry(dtype=["F32"]), r"norm.weight has the dtype \['F32'\]"),
    (
        entry(dtype="I16"),
        r"safetensors: model.norm.weight is stored as I16, which is not sup",
    ),
    (entry(dtype="F8_E4M3"), "stored as F8_E4M3, which is not supported .* quantised"),
    (entry(dtype="I32"), "norm.weight is stored as int32, and weights are floating-point"),
    (with_header(lambda tensor, header: header.update({NORM: None})), "norm.weight lacks one of"),
    (with_header(lambda tensor, header: tensor.pop("shape")), "norm.weight lacks one of"),
    (with_header(lambda *_: b"["), "header is no JSON"),
    (with_header(lambda *_: b"[" * 200_000), "header is nested too deeply"),
    (with_header(lambda *_: b"null"), "header is no object of names and values"),
    (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com"),
        "a pointer of Git LFS",
    ),
]
INDICES = [
    (with_index(lambda m: m.update({NORM: 5})), "has '5' as the file of model.norm.weight"),
    (with_index(lambda m: m.update(dict.fromkeys(m))), "has 'None' as the file of"),
    (with_index(lambda m: m.update({NORM: "a" * 5000})), "has 'aaaa.*' as the file of"),
    (with_index(lambda m: m.update({NORM: "../a"})), "has '../a' as the file of"),
    (with_index(lambda m: m.update({NORM: ""})), "none in this folder"),
    (with_index(lambda _: "[" * 200_000), "index.json is damaged .it is nested too deeply"),
    (with_index(lambda _: "[]"), "index.json is damaged .it is no object"),
    (with_index(lambda m: m.clear()), "no weight_map"),
    (stale_file, "two models, of which transformers reads the former; remove"),
]
VALUES = [
    (with_tensors(lambda t: t[NORM].fill_(float("nan"))), "model.norm.weight holds NaN or inf"),
    (
        with_tensors(lambda t: t[f"{EXPERTS_1}.3.up_proj.weight"][2].fill_(-torch.inf)),
        r"model.safetensors: model.layers.1.mlp.experts.3.up_proj.weight holds NaN or infinite",
    ),
    (
        with_tensors(lambda t: t["model.layers.0.mlp.experts.7.down_proj.weight"].zero_()),
        "experts.7.down_proj.weight holds nothing but zeros",
    ),
    (with_tensors(lambda t: t["lm_head.weight"].zero_()), "lm_head.weight holds nothing but zeros"),
]


@pytest.mark.parametrize("damage, words", HEADERS + INDICES + VALUES)
def test_files_that_no_model_can_be_read_from(folder, damage, words):
    damage(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        make("olmoe", folder)
    assert f"model.checkpoint={folder}" in str(caught.value)


def test_vectors_of_zeros_are_weights(folder):
    """Biases and the like may be."""
    with_tensors(lambda t: t[NORM].zero_())(folder)
    make("olmoe", folder)


def test_a_number_that_the_dtype_cannot_hold(folder):
    with_tensors(lambda t: t[NORM].fill_(1e6))(folder)
    make("olmoe", folder)
    backbone = Backbone.named("olmoe")
    with pytest.raises(CheckpointError, match="holds NaN or infinite .* as float16"):
        MoEModel.from_checkpoint(
            backbone(backbone.Config()), folder, folder, TOP_K, dtype=torch.float16
        )


def test_a_head_that_is_tied_and_yet_another_one(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tie_word_embeddings": True}))
    words = "lm_head.weight differs from model.embed_tokens.weight, .*tie_word_embeddings"
    with pytest.raises(CheckpointError, match=words):
        make("olmoe", folder)
    with_tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(
        folder
    )
    model = make("olmoe", folder)
    assert model.hf.lm_head.weight is model.hf.model.embed_tokens.weight
    state = {"model.embed_tokens.weight": model.hf.lm_head.weight.detach() + 1}
    model.backbone.save_trained(model.hf, state, folder, folder / "out")
    written = load_file(folder / "out/model.safetensors")
    assert torch.equal(written["lm_head.weight"], state["model.embed_tokens.weight"])
    make("olmoe", folder / "out")


@pytest.mark.parametrize("text", ["[]", "null", '"olmoe"', "{", "[" * 200_000])
@pytest.mark.parametrize("name", [*CASES, "upcycled"])
def test_a_config_that_is_none(name, text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json is damaged"):
        make(name, tmp_path)


HEADS = ["num_attention_heads", "num_key_value_heads", "n_heads"]
EXPERTS = ["num_experts", "moe_num_experts", "n_routed_experts"]
TOP = ["num_experts_per_tok", "moe_top_k", "top_k_experts"]
LAYERS = ["num_hidden_layers", "n_layers"]
WIDTH = ["hidden_size", "d_model"]


def put(config, keys, value):
    for key, old in config.items():
        if isinstance(old, dict) and key != "vision_config":
            put(old, keys, value)
        elif key in keys:
            config[key] = [value] * len(old) if isinstance(old, list) else value


@pytest.mark.parametrize(
    "keys, value, words",
    [
        (HEADS, 0, r"heads=0, a whole number"),
        (HEADS, "2", r"heads='2', a whole number"),
        (EXPERTS, -1, r"experts=\[?-1"),
        (EXPERTS, "8", r"experts=\[?'8'"),
        (TOP, 0, r"=0, a whole number from 1 on"),
        (TOP, 99, r"99 experts a token, of \d; it must be from 1 to \d"),
        (LAYERS, 1, r"unexpected: |there are 1 layers"),
        (LAYERS, 2.0, r"config.json"),
        (WIDTH, None, r"config.json"),
        (HEADS, 5, r"heads|has shape"),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_a_config_of_no_possible_model(name, keys, value, words, tmp_path):
    base, _ = write_case(name, tmp_path)
    path = base / "config.json"
    config = json.loads(path.read_text())
    put(config, keys, value)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        make(name, base)
