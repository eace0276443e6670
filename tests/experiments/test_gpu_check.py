"""What is read from the files that a check on a GPU leaves; no GPU is asked."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from experiments import gpu_check
from experiments.gpu_check import Goal, goals, page, steps
from gemoe_ds.analysis.provenance import provenance
from gemoe_ds.evaluation.throughput import Cost
from tests.helpers import repository
from tests.models.cases import write_case

XML = '<testsuites><testsuite name="pytest" errors="0" failures="{bad}" skipped="2" tests="9"/>'


def found(folder: Path, failed: dict[str, str] | None = None) -> dict[str, Goal]:
    return {goal.name: goal for goal in goals(folder, failed or {}, "olmoe")}


@pytest.mark.parametrize("bad, words", [(0, "7 of 7 pass, 2 skipped"), (1, "6 of 7 pass")])
def test_tests(tmp_path, bad, words):
    (tmp_path / "tests.json").write_text(XML.format(bad=bad))
    goal = found(tmp_path)["tests marked gpu"]
    assert goal.figure.startswith(words) and goal.is_met is (bad == 0)


def test_the_layer_as_the_benchmark_writes_it(tmp_path):
    """The shipped results of a CPU have the same form."""
    source = repository() / "results/bench_cpu.json"
    (tmp_path / "layer.json").write_bytes(source.read_bytes())
    rows = [r for r in json.loads(source.read_text())["rows"] if r["suite"] == "layer"]
    at_8 = {r["layer"]: r["ms"] for r in rows if r["mode"] == "forward" and r["mean_k"] == 8}
    peers = {n: ms for n, ms in at_8.items() if n not in ("gemoe_ds", *gpu_check._NO_LAYERS)}
    name = min(peers, key=peers.__getitem__)
    goal = found(tmp_path)["layer, forward, k 8"]
    assert goal.figure == f"{at_8['gemoe_ds'] / peers[name]:.2f} of the time of {name}"
    assert any(n.startswith("layer, frozen, realised / ideal at k 5.1") for n in found(tmp_path))


def test_training_as_full_size_writes_it(tmp_path):
    report = json.loads((repository() / "results/full_size.json").read_text())
    one = report["backbones"]["olmoe"]
    assert {name for cost in one["generation"] for name in cost} == set(Cost.__annotations__)
    one |= {"estimated_bytes_per_rank": 11 * 2**30, "device": "NVIDIA H100 80GB HBM3"}
    one["phases"][-1]["device_bytes"] = [10 * 2**30]
    (tmp_path / "training.json").write_text(json.dumps(report))
    by_name = found(tmp_path)
    assert by_name["memory"] == Goal(
        "memory", "11.0 GiB estimated, 10.0 used", "0.85 to 1.15 of what is used", True
    )
    assert by_name["training, FLOP/s"].figure.endswith("of 989 TFLOP/s, counted at k 8")
    assert by_name["answers, k = 8"].is_met is None


def test_what_failed_says_so_and_the_page_has_all(tmp_path):
    stock = {"mean_difference": 0.2, "largest_difference": 3.0, "dtype": "bfloat16"}
    stock |= {"greedy_tokens_equal": [5, 32]}
    (tmp_path / "stock.json").write_text(json.dumps(stock))
    by_name = found(tmp_path, {"layer": "error: out of memory", "training": "exit code 1"})
    assert by_name["layer"].figure == "failed: error: out of memory"
    assert by_name["training"].is_met is False
    assert by_name["log-probabilities beside the publishers' code"].is_met is False
    text = page(list(by_name.values()), provenance())
    assert text.count("**no**") == 3 and "the first 5 of 32 are equal" in text


def test_the_commands_are_those_of_the_modules_that_they_name(tmp_path):
    names = [step.command[2] for step in steps("olmoe", tmp_path)]
    assert names == ["pytest", "benchmarks", "experiments.full_size", "benchmarks.beside_stock"]
    assert len(steps("olmoe", None)) == 3
    (training,) = (step for step in steps("olmoe", None) if step.name == "training")
    assert "--again" in training.command, "or a part that has failed midway never goes on"


def test_without_a_gpu_it_is_a_line(capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_check.main([])
    assert ended.value.code == 2
    assert "there is no CUDA device here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "backbone, words",
    [
        ("qwen3_vl_moe", "qwen3_vl_moe does not fit --checkpoint: .* of model_type 'olmoe'"),
        ("olmo", "olmo.*olmoe"),
    ],
)
def test_another_backbones_folder_is_refused_before_anything_runs(
    backbone, words, tmp_path, monkeypatch, capsys
):
    checkpoint, _ = write_case("olmoe", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "run", lambda todo: pytest.fail("something runs"))
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--checkpoint", str(checkpoint), "--backbone", backbone])
    assert ended.value.code == 2
    assert re.search(words, capsys.readouterr().err)
