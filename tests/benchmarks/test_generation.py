"""`python -m benchmarks.generation` on a small model: who takes part, and what stops it."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import generation
from gemoe_ds.errors import ConfigError

SMALL = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_experts": 16}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(generation, "SHAPE", generation.SHAPE | SMALL)
    monkeypatch.setattr(generation, "CHECKED_LAYERS", 1)
    settings = (generation.Setting("batch 2", 2, 24, 4), generation.Setting("prefill", 1, 64, 1))
    monkeypatch.setattr(generation, "SETTINGS", settings)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_all_write_the_same_and_take_turns(small, tmp_path):
    out = tmp_path / "found.json"
    generation.main(["--rounds", "1", "--settings", "batch 2", "--out", str(out)])
    generation.main(["--rounds", "2", "--settings", "prefill", "--out", str(out), "--keep"])
    found = json.loads(out.read_text())
    names = ["transformers", "transformers, eager", "transformers, batched_mm"]
    names += [f"{who}, k {k}" for k in ("8", "5.1", "3") for who in ("gemoe_ds", "exported")]
    rows = found["rows"]
    assert [r["contender"] for r in rows if r["setting"] == "batch 2"] == names
    assert [r["rounds"] for r in rows] == [1] * 9 + [2] * 9
    for row in rows:
        assert row["tokens_per_s"] > 0 and row["of_stock"] > 0
        wanted = float(row["contender"].partition(", k ")[2] or 8)
        assert abs(row["mean_k"] - wanted) <= 0.02 * wanted + 0.005
    assert max(found["float32_logits_differ"].values()) < generation.BOUND
    assert found["bfloat16_from_float32"].keys() == {*names[:3], "gemoe_ds, k 8", "exported, k 8"}


def test_another_answer_stops_it(small, tmp_path, monkeypatch):
    """Of a contender whose last token is another."""
    ours = generation.Ours.written
    monkeypatch.setattr(
        generation.Ours,
        "written",
        lambda self, ids_BS, new: [[*row[:-1], -1] for row in ours(self, ids_BS, new)],
    )
    base = tmp_path / "base"
    generation.write_model(base, "bfloat16", **generation.SHAPE | {"num_hidden_layers": 1})
    ways = generation.Ways(base, tmp_path, "float32").at(generation.CHECKED, torch.device("cpu"))
    with pytest.raises(ConfigError, match="gemoe_ds, k 8: logits differ by .*nothing to time"):
        generation.check(ways, generation.CHECKED, torch.device("cpu"))


def test_ways_that_copy_too_much_are_left_out(small, monkeypatch):
    monkeypatch.setattr(generation, "free_memory", lambda: 2**20)
    setting = generation.SETTINGS[1]
    assert "copies 0.0" in generation._too_large("transformers, batched_mm", setting)
    assert generation._too_large("transformers, eager", setting) is None
