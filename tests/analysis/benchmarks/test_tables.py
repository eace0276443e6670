"""The tables against means and a bootstrap that are written out, on folders of seeded numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gemoe_ds.analysis.benchmarks.collect import read_modes
from gemoe_ds.analysis.benchmarks.results import Block, Row, Table
from gemoe_ds.analysis.benchmarks.tables import build_results
from tests.analysis.benchmarks.folders import (
    LAYERS,
    demo_run,
    mode_of,
    right_of,
    sums_of,
    write_mode,
    write_task,
)


def tables(*runs: Path) -> dict[str, Table]:
    results = build_results(read_modes(runs), command="")
    return {table.number: table for table in results.tables}


def ours(table: Table, block: int = 0) -> Block:
    return [block for block in table.blocks if not block.is_published][block]


def row(block: Block, label: str) -> Row:
    return next(row for row in block.rows if row.label == label)


def test_scores_averages_and_retention_are_plain_means(tmp_path: Path) -> None:
    tasks = {"mmlu_anatomy": 40, "mmlu_virology": 10, "gsm8k": 30}
    block = ours(tables(demo_run(tmp_path, tasks))["9"])
    assert [row.label for row in block.rows] == ["Top-4", "Top-2", "GeMoE"]
    base, gemoe = row(block, "Top-4"), row(block, "GeMoE")
    shares = [0.75, 0.8]  # of the two seeds, as demo_run has them
    rounded = [[round(share * number) for number in tasks.values()] for share in shares]
    mmlu = [100 * (right[0] + right[1]) / 50 for right in rounded]  # parts count by documents
    gsm8k = [100 * right[2] / 30 for right in rounded]
    assert gemoe.num_seeds == 2
    assert gemoe.cells["MMLU"].value == pytest.approx(np.mean(mmlu))
    assert gemoe.cells["MMLU"].sd == pytest.approx(np.std(mmlu, ddof=1))
    averages = np.mean([mmlu, gsm8k], axis=0)
    assert gemoe.average.value == pytest.approx(averages.mean())
    assert gemoe.retention.value == pytest.approx(100 * averages.mean() / base.average.value)
    assert base.retention.value == 100 and base.sparsity.value == 0 and base.average.sd is None
    assert set(gemoe.cells) == {"MMLU", "GSM-8K"} and block.averaged == ("MMLU", "GSM-8K")


def test_experts_and_parameters_are_of_an_average_token(tmp_path: Path) -> None:
    run = demo_run(tmp_path, {"pope": 20, "gqa": 60}, seeds=1)
    block = ours(tables(run)["1"])
    (_, _, trained) = read_modes([run])
    sums = [sums_of(trained.tasks[task]) for task in ("pope", "gqa")]
    mean_k_L = np.mean([one.k_hist_MLK.sum(0) @ np.arange(one.k_hist_MLK.shape[-1]) / one.num_tokens
                        for one in sums], axis=0)  # fmt: skip
    gemoe = row(block, "GeMoE")
    assert gemoe.mean_k.value == pytest.approx(mean_k_L.mean())
    idle = sum((8 - k) * 100_000 for k in mean_k_L)
    assert gemoe.activated_parameters == pytest.approx(10_000_000 - idle)
    assert gemoe.sparsity.value == pytest.approx(100 * (1 - mean_k_L.mean() / 4))
    assert row(block, "Top-4").activated_parameters == 10_000_000 - LAYERS * 4 * 100_000
    assert [row.label for row in block.rows] == ["Top-4", "GeMoE"], "no other k in Table 1"


def test_differences_are_those_of_a_bootstrap_written_out(tmp_path: Path) -> None:
    """Every benchmark draws its own documents; both methods meet the same ones."""
    rng = np.random.default_rng(0)
    numbers = {"gsm8k": 60, "mmlu_virology": 150}
    methods = {}
    for name, method, k in (("k_4", "top_k", 4), ("trained", "gemoe", None)):
        methods[name] = {task: rng.integers(0, 3, n) / 2 for task, n in numbers.items()}
        write_mode(tmp_path, name, mode_of(method, k), methods[name])
    gemoe = row(ours(tables(tmp_path)["9"]), "GeMoE")
    slow: dict[str, list[float]] = {task: [] for task in numbers}
    for _ in range(4000):
        for task, number in numbers.items():
            drawn = rng.integers(0, number, number)
            apart = methods["trained"][task][drawn].mean() - methods["k_4"][task][drawn].mean()
            slow[task].append(100 * apart)
    slow["average"] = list(np.mean(list(slow.values()), axis=0))
    cells = {"gsm8k": "GSM-8K", "mmlu_virology": "MMLU"}
    for task, apart in slow.items():
        cell = gemoe.average if task == "average" else gemoe.cells[cells[task]]
        ends = np.percentile(apart, [2.5, 97.5])
        assert cell.difference.value == pytest.approx(np.mean(apart), abs=0.5)
        assert cell.difference.interval == pytest.approx(ends, abs=0.1 * np.ptp(ends)), task
    assert gemoe.by_document == gemoe.average


def test_scores_that_are_no_mean_over_documents_have_no_interval(tmp_path: Path) -> None:
    tasks = {"mmbench_en_dev_static": 20, "pope": 20, "scienceqa_img": 20}
    table = tables(demo_run(tmp_path, tasks))["2"]
    block = ours(table)
    assert block.by_document == ("SQA-I",) and len(block.averaged) == 3
    gemoe = row(block, "GeMoE")
    for heading in ("MMB", "POPE"):
        assert gemoe.cells[heading].interval is None and gemoe.cells[heading].difference is None
    assert gemoe.cells["SQA-I"].interval and gemoe.by_document.difference
    assert gemoe.average.interval is None and gemoe.retention.interval is None
    more = ours(tables(demo_run(tmp_path / "more", {"ocrbench": 20, "ai2d": 20}))["8"])
    assert more.by_document == ("AI2D",)
    assert gemoe.average.value == pytest.approx(
        np.mean([cell.value for cell in gemoe.cells.values()])
    )


def test_a_share_that_lmms_eval_has_rounded_is_still_a_mean(tmp_path: Path) -> None:
    run = demo_run(tmp_path, {"mmmu_val": 90}, seeds=1)
    for path in (run / "benchmarks").glob("*/mmmu_val/scores.json"):
        found = json.loads(path.read_text())
        found["metrics"]["mmmu_acc,none"] = round(found["metrics"]["mmmu_acc,none"] + 4e-6, 5)
        path.write_text(json.dumps(found))
    assert ours(tables(run)["8"]).by_document == ("MMMU",)


def test_mme_is_two_scores_and_a_sum_that_no_average_holds(tmp_path: Path) -> None:
    block = ours(tables(demo_run(tmp_path, {"mme": 10, "ai2d": 10}))["8"])
    base = row(block, "Top-4")
    values = [base.cells[f"MME {part}"].value for part in ("perception", "cognition", "sum")]
    assert values == [800.0, 200.5, 1000.5]
    assert base.average.value == base.cells["AI2D"].value and block.averaged == ("AI2D",)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    full = {task: right_of(rng, 10, 0.5) for task in ("gsm8k", "mmlu_virology", "mmlu_anatomy")}
    partly = {task: full[task] for task in ("gsm8k", "mmlu_virology")}
    write_mode(tmp_path, "k_2", mode_of("top_k", 2), full)
    trained = write_mode(tmp_path, "trained", mode_of("gemoe"), partly)
    (trained / "humaneval").mkdir()
    (trained / "humaneval/answers.jsonl").touch()
    table = tables(tmp_path)["9"]
    block = ours(table)
    gemoe = row(block, "GeMoE")
    assert set(gemoe.cells) == {"GSM-8K"} and gemoe.average is None and gemoe.mean_k is None
    assert gemoe.by_document is None and row(block, "Top-2").average is not None
    said = "\n".join(table.notes)
    assert "MMLU is not whole in GeMoE" in said
    assert "HumanEval is answered and not scored (trained/humaneval): run `gemoe benchmark" in said
    assert "was not answered with its own k" in said and "--k 4" in said
    assert "(2 of 4 benchmarks)" in said


def test_limits_and_a_baseline_of_zero_are_said(tmp_path: Path) -> None:
    write_mode(tmp_path, "k_4", mode_of("top_k", 4), {"gqa": np.zeros(5)})
    changed = {"num_fewshot": 0, "limit": 5, "judge": None}
    folder = tmp_path / "k_4/scienceqa_img"
    write_task(folder, np.zeros(5), mode_of("top_k", 4), choices=changed, version="Yaml")
    table = tables(tmp_path)["1"]
    said = "\n".join(table.notes)
    assert "Only the first documents of SQA-I were asked (`--limit`)." in said
    assert "is unknown: its own k has nothing right" in said
    (choice,) = [line for line in table.choices if "SQA-I" in line]
    assert choice.endswith(
        "of lmms_eval 0.7.3, 5 documents, exact_match,none; limit 5; num_fewshot 0."
    )


def test_circular_turns_and_f1_have_no_interval_even_where_means_agree(tmp_path: Path) -> None:
    run = demo_run(tmp_path, {"pope": 20, "mmbench_en_dev_static": 20}, seeds=1)
    for path in (run / "benchmarks").glob("*/*/scores.json"):
        found = json.loads(path.read_text())
        right = np.load(path.with_name("scored.npz"))["right_N"].mean()
        found["metrics"] = {"pope_f1_score,none": right, "gpt_eval_score,none": 100 * right}
        path.write_text(json.dumps(found))
    assert ours(tables(run)["1"]).by_document == ()


def test_a_table_without_a_row_of_ours_is_left_out(tmp_path: Path) -> None:
    write_mode(tmp_path, "k_2", mode_of("top_k", 2), {"pope": np.ones(5)})
    assert list(tables(tmp_path)) == ["2"]


def test_models_have_blocks_and_retention_of_their_own(tmp_path: Path) -> None:
    one = demo_run(tmp_path / "one", {"gsm8k": 20}, base="a/olmoe")
    two = demo_run(tmp_path / "two", {"gsm8k": 20}, base="b/other", seeds=1)
    table = tables(one, two)["9"]
    names = [block.model for block in table.blocks]
    assert names == ["olmoe, olmoe (8Top4)", "olmoe, other (8Top4)", "OLMoE-1B-7B (64Top8)"]
    assert row(ours(table, 1), "GeMoE").num_seeds == 1 and row(ours(table), "GeMoE").num_seeds == 2


def test_the_untouched_model_of_two_runs_is_one_row(tmp_path: Path) -> None:
    """Every run may bring its own k 4; seeds are of what was trained."""
    tasks = {"gsm8k": right_of(np.random.default_rng(0), 30, 0.6)}
    for seed in (3, 4):
        out = tmp_path / f"seed_{seed}" / "benchmarks"
        write_mode(out, "k_4", mode_of("top_k", 4, seed=seed), tasks)
        write_mode(out, "trained", mode_of("gemoe", seed=seed), tasks)
    block = ours(tables(tmp_path / "seed_3", tmp_path / "seed_4")["9"])
    assert [(row.label, row.num_seeds) for row in block.rows] == [("Top-4", 1), ("GeMoE", 2)]
    assert row(block, "GeMoE").cells["GSM-8K"].difference.value == 0
