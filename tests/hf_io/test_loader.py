"""Stored tensors become parameters and the way back: by rules, by shard, bit by bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from gemoe_ds.errors import CheckpointError
from gemoe_ds.hf_io.companions import index_files
from gemoe_ds.hf_io.hf_config import meta_model
from gemoe_ds.hf_io.key_rules import KeyMap, Rule, swiglu_experts
from gemoe_ds.hf_io.loader import Weights, materialise
from gemoe_ds.hf_io.rewriter import rewrite
from gemoe_ds.hf_io.safetensors_reader import open_stored
from gemoe_ds.hf_io.targets import Target
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.moe_model import MoEModel
from tests.helpers import repository
from tests.hf_io.one_file import TOP_K, make, with_tensors

E, D, F = 4, 6, 5
KEYS = KeyMap(
    (
        *swiglu_experts("blocks.{l}.experts", "layers.{l}.experts"),
        Rule("blocks.{l}.qkv", "layers.{l}.q", stored_part=(0, 3)),
        Rule("blocks.{l}.qkv", "layers.{l}.k", stored_part=(1, 3)),
        Rule("blocks.{l}.qkv", "layers.{l}.v", stored_part=(2, 3)),
        Rule("patch", "conv", rearrange="d (y x c) -> d c y x", sizes={"y": 2, "x": 2}),
        Rule("fused", "fused", by_row=True, rearrange="d g -> g d"),
    ),
    unused=("*.never_used",),
)


class Model(nn.Module):
    """One of each: stacked, split, rearranged and fused."""

    def __init__(self, _: object = None) -> None:
        super().__init__()
        layer = nn.Module()
        layer.experts = nn.Module()
        layer.experts.gate_up_proj = nn.Parameter(torch.randn(E, 2 * F, D))
        layer.experts.down_proj = nn.Parameter(torch.randn(E, D, F))
        for name in "qkv":
            setattr(layer, name, nn.Parameter(torch.randn(D, D)))
        self.layers = nn.ModuleList([layer])
        self.conv = nn.Parameter(torch.randn(7, 3, 2, 2))
        self.fused = nn.Parameter(torch.randn(E, 8, D))
        self.head = nn.Parameter(torch.randn(9))
        self.alias = self.head  # tied
        self.register_buffer("table", torch.arange(3), persistent=False)


def stored_by_hand(model: Model) -> dict[str, torch.Tensor]:
    """The file's tensors, written without the rules."""
    layer, found = model.layers[0], {}
    for e in range(E):
        found[f"blocks.0.experts.{e}.gate_proj.weight"] = layer.experts.gate_up_proj[e, :F]
        found[f"blocks.0.experts.{e}.up_proj.weight"] = layer.experts.gate_up_proj[e, F:]
        found[f"blocks.0.experts.{e}.down_proj.weight"] = layer.experts.down_proj[e]
    found["blocks.0.qkv"] = torch.cat([layer.q, layer.k, layer.v])
    found["patch"] = torch.stack([w.permute(1, 2, 0).flatten() for w in model.conv])
    found["fused"] = torch.stack([row.t() for row in model.fused])
    found["head"] = model.head
    found["blocks.0.never_used"] = torch.ones(2)
    return {key: tensor.detach().contiguous() for key, tensor in found.items()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def folder(model, tmp_path):
    """Two shards and an index."""
    tensors = stored_by_hand(model)
    keys = list(tensors)
    weight_map = {}
    for number, part in enumerate((keys[::2], keys[1::2])):
        name = f"model-{number}.safetensors"
        save_file({key: tensors[key] for key in part}, tmp_path / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_filled_meta_model_is_the_model(folder, model, dtype):
    empty = meta_model(Model, None)
    assert all(p.is_meta for p in empty.parameters()) and empty.table.tolist() == [0, 1, 2]
    empty.requires_grad_(False)
    weights = Weights(folder, KEYS, empty)
    weights.fill(materialise(empty, dtype))
    assert empty.alias is empty.head
    for name, parameter in model.named_parameters():
        assert torch.equal(empty.get_parameter(name), parameter.to(dtype)), name


@pytest.mark.parametrize("local", [slice(0, 2), slice(2, 4), slice(3, 4), slice(2, 2)])
def test_a_shard_reads_its_own_rows(folder, model, local):
    weights = Weights(folder, KEYS, meta_model(Model, None))
    for name in ("layers.0.experts.gate_up_proj", "layers.0.experts.down_proj", "fused"):
        whole = model.get_parameter(name)
        mine = torch.full(whole[local].shape, torch.nan)
        weights.fill({name: Target(mine, tuple(whole.shape), local.start)})
        assert torch.equal(mine, whole[local])


def test_the_folder_that_would_fit(model):
    wanted = {key: tuple(t.shape) for key, t in stored_by_hand(model).items()}
    del wanted["blocks.0.never_used"]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert KEYS.stored_shapes(shapes) == wanted


def test_a_meta_model_draws_no_random_numbers():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    meta_model(Model, None)
    assert torch.equal(torch.rand(3), expected)


def test_rewriting_is_reading_backwards(folder, model, tmp_path):
    """Every parameter replaced by another one, then by the first again: the same bytes."""
    weights = Weights(folder, KEYS, meta_model(Model, None))
    changed = {name: p.detach() + 1 for name, p in model.named_parameters()}
    out = [tmp_path / "changed", tmp_path / "again"]
    for path in out:
        path.mkdir()
    rewrite(weights, changed, out[0])
    other = meta_model(Model, None)
    Weights(out[0], KEYS, other).fill(materialise(other, torch.float32))
    for name, tensor in changed.items():
        assert torch.equal(other.get_parameter(name), tensor), name
    again = {name: p.detach() for name, p in model.named_parameters()}
    rewrite(Weights(out[0], KEYS, other), again, out[1])
    for file in folder.glob("*.safetensors"):
        before, after = load_file(file), load_file(out[1] / file.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert (out[1] / "config.json").is_file()


class Asked(dict):
    """Which of its tensors somebody has looked at."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.names = set()

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("num_ranks", [2, 3, 7])
def test_ranks_that_write_some_of_the_files_each(folder, model, tmp_path, num_ranks):
    """The same folder as one rank writes; nobody looks at a tensor that is in none of its files."""
    weights = Weights(folder, KEYS, meta_model(Model, None))
    changed = {name: p.detach() + 1 for name, p in model.named_parameters()}
    rewrite(weights, changed, tmp_path / "alone")
    asked = [Asked(changed) for _ in range(num_ranks)]
    for rank, tensors in enumerate(asked):
        rewrite(weights, tensors, tmp_path / "together", (rank, num_ranks))
    index_files(tmp_path / "together")
    for path in sorted((tmp_path / "alone").iterdir()):
        assert path.read_bytes() == (tmp_path / "together" / path.name).read_bytes(), path.name
    files = sorted({stored.file for stored in weights.stored.values()})
    for rank, tensors in enumerate(asked):
        mine = set(files[rank::num_ranks])
        assert tensors.names == {
            piece.name for piece in weights.slices if weights.stored[piece.key].file in mine
        }


def test_what_was_not_changed_is_copied(folder, model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    head = {"head": torch.arange(9, dtype=torch.float64)}
    rewrite(Weights(folder, KEYS, meta_model(Model, None)), head, out)
    files = list(folder.glob("*.safetensors"))
    before, after = (
        {k: t for f in files for k, t in load_file(at / f.name).items()} for at in (folder, out)
    )
    assert before.keys() == after.keys() > head.keys()
    for key, same in (before | head).items():
        assert torch.equal(after[key], same) and after[key].dtype == same.dtype


def edit(folder, change):
    """Rewrite the shard that holds a key after `change` had its tensors and the index's map."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in set(index["weight_map"].values()):
        tensors |= load_file(folder / file)
        (folder / file).unlink()
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("head"), r"missing: head \(for head; 1 of 16 keys\)"),
        (
            lambda t: t.pop("blocks.0.experts.2.up_proj.weight"),
            r"missing: blocks.0.experts.2.up_proj.weight \(for layers.0.experts.gate_up_proj",
        ),
        (lambda t: t.update(extra=torch.ones(1)), r"unexpected: extra \(1 of 18 keys\)"),
        (
            lambda t: t.update({"blocks.0.experts.4.up_proj.weight": torch.ones(1)}),
            r"unexpected: blocks.0.experts.4.up_proj.weight",
        ),
        (lambda t: t.update(head=torch.ones(8)), r"head has shape \[8\], .* make \[9\] of head"),
        (lambda t: t.update(patch=torch.ones(7, 13)), r"patch has shape \[7, 13\]"),
        (lambda t: t.update(fused=torch.ones(E + 1, D, 8)), r"fused has shape \[5, 6, 8\]"),
        (lambda t: t.update({"blocks.0.qkv": torch.ones(3 * D + 1, D)}), r"qkv has shape"),
        (lambda t: t.update({"blocks.0.qkv": torch.ones(())}), r"qkv has shape \[\]"),
    ],
)
def test_folders_that_do_not_fit_are_refused_by_name(folder, change, words):
    edit(folder, change)
    with pytest.raises(CheckpointError, match=words):
        Weights(folder, KEYS, meta_model(Model, None))


def test_a_tied_parameter_may_be_stored_twice(folder, model):
    edit(folder, lambda t: t.update(alias=t["head"].clone()))
    Weights(folder, KEYS, meta_model(Model, None))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: (f / "model-1.safetensors").unlink(), r"1 of 2 shards are missing: model-1"),
        (lambda f: cut(f / "model-1.safetensors", -1), r"model-1.safetensors has .* cut short"),
        (lambda f: cut(f / "model-1.safetensors", 100), r"model-1.safetensors is damaged"),
        (lambda f: cut(f / "model-0.safetensors", 3), r"model-0.safetensors is damaged"),
        (lambda f: (f / "model-0.safetensors").write_bytes(b"\xff" * 99), r"model-0.* is damaged"),
        (
            lambda f: shutil.copy(f / "model-0.safetensors", f / "model-1.safetensors"),
            r"model-1.safetensors and model.safetensors.index.json disagree",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("{}"),
            r"index.json is damaged",
        ),
    ],
)
def test_damage_is_named_before_anything_is_read(folder, damage, words):
    damage(folder)
    with pytest.raises(CheckpointError, match=words):
        Weights(folder, KEYS, meta_model(Model, None))


def test_an_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        open_stored(tmp_path)


@pytest.mark.parametrize("shard_size", ["10KB", "1GB"])
def test_as_transformers_saves_and_loads(tmp_path, shard_size):
    """The public per-expert layout: our reader against transformers' own."""
    config = OlmoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    OlmoeForCausalLM(config).bfloat16().save_pretrained(tmp_path, max_shard_size=shard_size)
    stock = OlmoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    keys = KeyMap(swiglu_experts(*["model.layers.{l}.mlp.experts"] * 2))
    ours = meta_model(OlmoeForCausalLM, config).requires_grad_(False)
    Weights(tmp_path, keys, ours).fill(materialise(ours, torch.bfloat16))
    assert ours.state_dict().keys() == stock.state_dict().keys()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


PEAK = """
import resource, sys, torch
from pathlib import Path
from gemoe_ds.hf_io.key_rules import KeyMap, Rule
from gemoe_ds.hf_io.hf_config import meta_model
from gemoe_ds.hf_io.loader import Weights
from gemoe_ds.hf_io.targets import Target

class Big(torch.nn.Module):
    def __init__(self, _):
        super().__init__()
        self.experts = torch.nn.Parameter(torch.empty(32, 1024, 4096, device="meta"))

keys = KeyMap((Rule("e.{e}", "experts"),))
weights = Weights(Path(sys.argv[1]), keys, meta_model(Big, None))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mine = torch.empty(16, 1024, 4096, dtype=torch.bfloat16)
weights.fill({"experts": Target(mine, (32, 1024, 4096), 16)})
assert mine[-1, -1, -1] == 31
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 / (mine.numel() * 2))
"""


def test_reading_a_shard_needs_no_more_memory_than_the_shard(tmp_path):
    """Half of a file of 256 MiB, in a process of its own: at most 1.15 times that half."""
    tensors = {f"e.{e}": torch.full((1024, 4096), e, dtype=torch.bfloat16) for e in range(32)}
    save_file(tensors, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path],
        cwd=repository(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 1.15


NORM, EXPERTS_1 = "model.norm.weight", "model.layers.1.mlp.experts"


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


@pytest.mark.parametrize("damage, words", VALUES)
def test_weights_that_no_model_has(one_file, damage, words):
    damage(one_file)
    with pytest.raises(CheckpointError, match=words) as caught:
        make("olmoe", one_file)
    assert f"model.checkpoint={one_file}" in str(caught.value)


def test_vectors_of_zeros_are_weights(one_file):
    """Biases and the like may be."""
    with_tensors(lambda t: t[NORM].zero_())(one_file)
    make("olmoe", one_file)


def test_a_number_that_the_dtype_cannot_hold(one_file):
    with_tensors(lambda t: t[NORM].fill_(1e6))(one_file)
    make("olmoe", one_file)
    backbone = Backbone.named("olmoe")
    with pytest.raises(CheckpointError, match="holds NaN or infinite .* as float16"):
        MoEModel.from_checkpoint(
            backbone(backbone.Config()), one_file, one_file, TOP_K, dtype=torch.float16
        )


def test_a_head_that_is_tied_and_yet_another_one(one_file):
    path = one_file / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tie_word_embeddings": True}))
    words = "lm_head.weight differs from model.embed_tokens.weight, .*tie_word_embeddings"
    with pytest.raises(CheckpointError, match=words):
        make("olmoe", one_file)
    with_tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(
        one_file
    )
    model = make("olmoe", one_file)
    assert model.hf.lm_head.weight is model.hf.model.embed_tokens.weight
    state = {"model.embed_tokens.weight": model.hf.lm_head.weight.detach() + 1}
    model.backbone.save_trained(model.hf, state, one_file, one_file / "out")
    written = load_file(one_file / "out/model.safetensors")
    assert torch.equal(written["lm_head.weight"], state["model.embed_tokens.weight"])
    make("olmoe", one_file / "out")
