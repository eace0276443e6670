"""Gates are read from files alone: those of a checkpoint, and of the base model under it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gemoe_ds.checkpoint import manifest
from gemoe_ds.checkpoint.gates import read_gates
from gemoe_ds.errors import CheckpointError

LAYERS, EXPERTS, WIDTH = 11, 4, 3  # layer 10 comes after layer 2


def write_checkpoint(folder: Path, base: Path | None, layers: int = LAYERS) -> Path:
    """Trained gates are the base's, plus one."""
    folder.mkdir(parents=True)
    tensors = {
        f"hf.model.layers.{n}.mlp.router.gate.weight": torch.full((EXPERTS, WIDTH), n + 1.0)
        for n in range(layers)
    } | {"hf.model.layers.0.mlp.router.eap.weight": torch.zeros(8, WIDTH)}
    save_file(tensors, folder / "weights-00000.safetensors")
    entries = manifest.describe(tensors, "weights-00000.safetensors")
    head = {"schema": manifest.SCHEMA, "step": 1, "updates": 1, "identity": {}, "tensors": entries}
    head["base"] = None if base is None else {"path": str(base), "sha256": ""}
    (folder / manifest.MANIFEST).write_text(json.dumps(head))
    return folder


def write_base(folder: Path, shape: tuple[int, int] = (EXPERTS, WIDTH)) -> Path:
    folder.mkdir()
    tensors = {
        f"model.layers.{n}.mlp.gate.weight": torch.full(shape, float(n), dtype=torch.bfloat16)
        for n in range(LAYERS)
    }
    others = {
        "model.layers.0.mlp.shared_expert_gate.weight": torch.zeros(1, WIDTH),
        "model.layers.0.mlp.experts.0.gate_proj.weight": torch.zeros(EXPERTS, WIDTH),
    }
    save_file(tensors | others, folder / "model.safetensors")
    return folder


def test_layers_are_in_order_before_and_after(tmp_path: Path) -> None:
    gates = read_gates(write_checkpoint(tmp_path / "step-000001", write_base(tmp_path / "base")))
    assert list(gates) == ["before", "after"]
    for name, first in (("before", 0), ("after", 1)):
        assert gates[name].shape == (LAYERS, EXPERTS, WIDTH)
        assert gates[name][:, 0, 0].tolist() == list(range(first, LAYERS + first))


def test_a_dense_base_and_none_have_no_gates_before(tmp_path: Path) -> None:
    dense = write_base(tmp_path / "dense", (8, WIDTH))
    assert list(read_gates(write_checkpoint(tmp_path / "a", dense))) == ["after"]
    assert list(read_gates(write_checkpoint(tmp_path / "b", None))) == ["after"]


def test_what_is_gone_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no manifest.json there"):
        read_gates(tmp_path)
    moved = write_checkpoint(tmp_path / "a", tmp_path / "gone")
    with pytest.raises(CheckpointError, match="gone: the base model is not there"):
        read_gates(moved)
    with pytest.raises(CheckpointError, match="no gate of a router was trained"):
        read_gates(write_checkpoint(tmp_path / "b", None, layers=0))
    (moved / "weights-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="weights-00000"):
        read_gates(moved)
