"""Files that no weights can be read from: one line of what and where, no traceback."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
from safetensors.torch import load_file

from gemoe_ds.errors import CheckpointError
from tests.hf_io.one_file import make

INDEX, NORM = "model.safetensors.index.json", "model.norm.weight"


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
    (entry(dtype="F8_E5M2"), "stored as F8_E5M2, which is not supported .* quantised"),
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


@pytest.mark.parametrize("damage, words", HEADERS + INDICES)
def test_files_that_no_model_can_be_read_from(one_file, damage, words):
    damage(one_file)
    with pytest.raises(CheckpointError, match=words) as caught:
        make("olmoe", one_file)
    assert f"model.checkpoint={one_file}" in str(caught.value)
