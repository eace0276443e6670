"""The models that ship are whole, are used by the demo, and have a command that makes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from experiments.backbones.__main__ import RUNS, SOURCES, backbone_steps, store, write_checksums
from tests.helpers import repository

SHIPPED = repository() / "experiments/backbones"


def test_every_file_has_its_checksum() -> None:
    listed = dict(
        reversed(line.split("  ")) for line in (SHIPPED / "SHA256SUMS").read_text().splitlines()
    )
    for name, expected in listed.items():
        assert hashlib.sha256((SHIPPED / name).read_bytes()).hexdigest() == expected, name
    folders = {*SOURCES, "tokenizer"}
    assert {name.split("/")[0] for name in listed} == folders
    assert len(listed) == 3 * len(SOURCES) + 2


def test_what_ships_is_in_bfloat16_and_three_different_models() -> None:
    models = [load_file(SHIPPED / name / "model.safetensors") for name in SOURCES]
    for weights in models:
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
        assert weights.keys() == models[0].keys()
    gates = {name for name in models[0] if name.endswith("mlp.gate.weight")}
    assert len(gates) == 4
    for name in gates:
        assert all(not torch.equal(models[0][name], other[name]) for other in models[1:])


def test_a_step_comes_after_what_it_needs() -> None:
    steps = backbone_steps(Path("x"))
    names = [step.name for step in steps]
    for position, step in enumerate(steps):
        assert set(step.needs) <= set(names[:position])
    outputs = {step.output for step in steps}
    assert {RUNS / run for run in SOURCES.values()} <= outputs


def test_weights_are_rounded_to_the_nearest(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = {"a": torch.randn(5, 3)}
    (RUNS / "tokenizer").mkdir(parents=True)
    (RUNS / "tokenizer/tokenizer.json").write_text("{}")
    for run in SOURCES.values():
        folder = RUNS / run / "hf"
        folder.mkdir(parents=True)
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"dtype": "float32", "x": 1}))
        (folder / "generation_config.json").write_text("{}")
    store(tmp_path / "out")
    stored = load_file(tmp_path / "out/plain/model.safetensors")["a"]
    assert torch.equal(stored, weights["a"].bfloat16())
    config = json.loads((tmp_path / "out/plain/config.json").read_text())
    assert config == {"dtype": "bfloat16", "x": 1}
    sums = (tmp_path / "out/SHA256SUMS").read_text()
    (tmp_path / "out/SHA256SUMS").unlink()
    write_checksums(tmp_path / "out")
    assert (tmp_path / "out/SHA256SUMS").read_text() == sums
