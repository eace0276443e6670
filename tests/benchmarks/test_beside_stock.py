"""Our model of a folder equals the code that the folder names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import beside_stock
from tests.helpers import repository
from tests.models.cases import write_case


@pytest.mark.parametrize("name", ["olmoe", pytest.param("qwen3_vl_moe", marks=pytest.mark.slow)])
def test_a_folder_beside_transformers(name, tmp_path, monkeypatch):
    monkeypatch.setattr(beside_stock, "TEXT", "a b c d e f g h")
    base, tokenizer = write_case(name, tmp_path)
    out = tmp_path / "found.json"
    options = [f"model.backbone.name={name}", f"model.checkpoint={base}", "model.dtype=float32"]
    options += [f"data.tokenizer={tokenizer}", "--out", str(out)]
    recipe = repository() / "experiments/recipes/full_size.yaml"
    assert beside_stock.main([str(recipe), *options]) == 0
    found = json.loads(Path(out).read_text())
    assert found["largest_difference"] < 1e-4
    assert found["same_best_token"] == 1
    assert found["greedy_tokens_equal"] == [beside_stock.NEW_TOKENS, beside_stock.NEW_TOKENS]


def test_code_that_does_not_load_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(beside_stock, "TEXT", "a b c d e f g h")
    base, tokenizer = write_case("molmoe", tmp_path)
    out = tmp_path / "found.json"
    options = ["model.backbone.name=molmoe", f"model.checkpoint={base}", "model.dtype=float32"]
    options += [f"data.tokenizer={tokenizer}", "--out", str(out)]
    recipe = repository() / "experiments/recipes/full_size.yaml"
    assert beside_stock.main([str(recipe), *options]) == 0
    assert "molmo" in json.loads(out.read_text())["not_compared"]
