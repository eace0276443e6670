"""Folders of checkpoints as users have them: read, or refused in one line with the way out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gemoe_ds.errors import CheckpointError
from gemoe_ds.hf_io.safetensors_reader import INDEX, SINGLE
from tests.hf_io.folders import as_links, below, tensors, with_config
from tests.models.olmoe.small import write_olmoe
from tests.models.small import make_model
from tests.tiny import write_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tokenizer(write_olmoe(tmp_path_factory.mktemp("foreign") / "base"))


def single(base: Path, folder: Path, prefix: str = "", file: str = SINGLE, drop: str = "") -> Path:
    """The same in one file, under other names."""
    folder.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors" and path.name != INDEX:
            shutil.copyfile(path, folder / path.name)
    kept = {
        f"{prefix}{k}".removeprefix("-model."): t for k, t in tensors(base).items() if k != drop
    }
    save_file(kept, folder / file)
    return folder


@pytest.mark.parametrize("layout", [as_links, below, single])
def test_layouts_that_transformers_reads(layout, base, tmp_path):
    expected, found = (
        make_model("olmoe", folder).state_dict() for folder in (base, layout(base, tmp_path / "f"))
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_frequencies_that_the_config_implies_may_be_stored(base, tmp_path):
    folder = single(base, tmp_path / "f")
    kept = tensors(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(kept, folder / SINGLE)
    make_model("olmoe", folder)


def escaping(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {k: f"../base/{f}" for k, f in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def no_index(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    (folder / INDEX).unlink()
    return folder


def renamed(base: Path, folder: Path, name: str) -> Path:
    (single(base, folder) / SINGLE).rename(folder / name)
    return folder


def adapter(base: Path, folder: Path) -> Path:
    (renamed(base, folder, "adapter_model.safetensors") / "adapter_config.json").write_text("{}")
    return folder


def dead_links(base: Path, folder: Path) -> Path:
    snapshot = as_links(base, folder)
    shutil.rmtree(folder / "blobs")
    return snapshot


def cache_root(base: Path, folder: Path) -> Path:
    return as_links(base, folder).parents[1]


def marked(base: Path, folder: Path) -> Path:
    path = single(base, folder) / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return folder


HEAD = "lm_head.weight"
REFUSED = {
    "leads out": (escaping, "none in this folder"),
    "no index": (no_index, "shards without their model.safetensors.index.json"),
    "other name": (lambda b, f: renamed(b, f, "OLMoE.safetensors"), "rename it"),
    "pickle": (lambda b, f: renamed(b, f, "pytorch_model.bin"), "is a pickle"),
    "adapter": (adapter, "merge_and_unload"),
    "dead links": (dead_links, "copy the folder with what its links lead to"),
    "cache": (cache_root, "give .*snapshots/abc"),
    "mark": (marked, "byte order mark"),
    "DDP": (lambda b, f: single(b, f, "module."), "begin with 'module.': DistributedData"),
    "PEFT": (lambda b, f: single(b, f, "base_model.model."), "merge_and_unload"),
    "compiled": (lambda b, f: single(b, f, "_orig_mod."), "torch.compile put it there"),
    "both": (lambda b, f: single(b, f, "module._orig_mod."), "begin with 'module._orig_mod.'"),
    "unknown": (lambda b, f: single(b, f, "student."), "begin with 'student.': rename the keys"),
    "no head": (lambda b, f: single(b, f, "-", drop=f"-{HEAD}"), "the keys lack 'model.'"),
    "tied": (lambda b, f: single(b, f, drop=HEAD), "tie_word_embeddings to true"),
    "quantised": (
        lambda b, f: with_config(single(b, f), quantization_config={"quant_method": "gptq"}),
        "quantization_config says gptq",
    ),
    "resized": (lambda b, f: with_config(single(b, f), vocab_size=99), "of one model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_and_the_way_out_are_one_line(case, base, tmp_path):
    write, words = REFUSED[case]
    folder = write(base, tmp_path / "f")
    with pytest.raises(CheckpointError, match=words) as error:
        make_model("olmoe", folder)
    assert str(error.value).count(str(folder)) <= 2 and "\n" not in str(error.value)
