"""results.json: retention, sparsity, the order of rows, and rows that must not be compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemoe_ds.analysis.results import Results, build_results, read_results
from gemoe_ds.errors import DataError
from gemoe_ds.files import write_text
from tests.analysis.evaluations import demo_evaluations, record

TOP_8 = record("top_k", 8, {"count": 0.9, "fact": 0.7})


def gemoe(seed: int, fact: float = 0.69) -> object:
    return record("gemoe", None, {"count": 0.9, "fact": fact}, seed=seed, mean_k_per_layer=(4, 6))


def test_retention_and_sparsity_by_hand() -> None:
    results = build_results([TOP_8, gemoe(0)], command="make demo")
    assert [row.retention for row in results.rows] == pytest.approx([100, 100 * 0.795 / 0.8])
    assert [row.sparsity for row in results.rows] == pytest.approx([0, 37.5])
    assert results.meta.backbone_k == 8
    assert results.meta.command == "make demo"
    assert results.meta.commit == "0123abc"
    assert results.meta.seconds == 20
    assert build_results([TOP_8], command="", seconds=7).meta.seconds == 7


def test_sparsity_counts_against_the_backbones_own_k() -> None:
    changed = {"backbone_k": 6}
    top_6 = record("top_k", 6, {"fact": 0.8}, **changed)
    top_3 = record("top_k", 3, {"fact": 0.6}, **changed)
    rows = build_results([top_3, top_6], command="").rows
    assert [row.sparsity for row in rows] == pytest.approx([50, 0])
    assert [row.retention for row in rows] == pytest.approx([75, 100])


def test_groups_stand_in_the_order_of_the_table() -> None:
    records = [record for record, _ in demo_evaluations()]
    results = build_results(records[::-1], command="")
    assert [group.label for group in results.groups] == [
        *(f"Top-{k}" for k in range(8, 1, -1)),
        "Top-8, tuned",
        "Top-5, tuned",
        "GeMoE",
    ]
    assert [row.seed for row in results.adaptive[0].rows] == [0, 1, 2]
    assert results.baseline.rows[0].retention == 100


def test_budgets_of_one_training_are_rows_of_their_own() -> None:
    """As trained first; figures and sections are of one of them."""
    held = [gemoe(seed).model_copy(update={"budget_k": k}) for k in (3.0, 4.0) for seed in (0, 1)]
    results = build_results([TOP_8, *held, gemoe(0), gemoe(1)], command="")
    labels = ["Top-8", "GeMoE", "GeMoE, held to 4", "GeMoE, held to 3"]
    assert [group.label for group in results.groups] == labels
    assert [group.label for group in results.one_each] == labels[:2]
    assert [len(group.rows) for group in results.groups] == [1, 2, 2, 2]
    only = build_results([TOP_8, *held], command="")
    assert [group.label for group in only.adaptive] == ["GeMoE, held to 4"]
    with pytest.raises(DataError, match="two of the evaluations are gemoe k=None held to 3 seed=0"):
        build_results([TOP_8, *held, held[0]], command="")


def test_mean_and_sample_standard_deviation_over_seeds() -> None:
    results = build_results([TOP_8, gemoe(0, 0.6), gemoe(1, 0.7), gemoe(2, 0.8)], command="")
    (group,) = results.adaptive
    assert group.mean(lambda row: row.accuracy_by_kind["fact"]) == pytest.approx(0.7)
    assert group.sd(lambda row: row.accuracy_by_kind["fact"]) == pytest.approx(0.1)
    assert results.baseline.sd(lambda row: row.accuracy) is None


def test_a_method_that_is_not_known_here_is_shown_by_its_name() -> None:
    other = record("mine", None, {"count": 0.9, "fact": 0.7}, mean_k_per_layer=(4, 6))
    results = build_results([other, TOP_8], command="")
    assert [group.label for group in results.groups] == ["Top-8", "mine"]


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([], "no evaluation was given"),
        ([gemoe(0)], r"no evaluation of top_k with k=8 .*\(gemoe\).*the model with --k 8 too"),
        (
            [record("top_k", 5, {"fact": 0.9}), record("top_k_tuned", 8, {"fact": 0.9})],
            r"no evaluation of top_k with k=8 .*\(top_k k=5, top_k_tuned k=8\)",
        ),
        ([TOP_8, gemoe(1), gemoe(1)], "two of the evaluations are gemoe k=None seed=1"),
        (
            [
                record("top_k", 8, {"fact": 0.9}, data_fingerprint="a"),
                record("top_k", 5, {"fact": 0.9}, data_fingerprint="b"),
            ],
            r"top_k k=5 seed=0 is of other samples \(--data, --limit\) than top_k k=8 seed=0",
        ),
        (
            [
                record("top_k", 8, {"fact": 0.9}, data_fingerprint="a"),
                record("top_k", 5, {"fact": 0.9}, data_fingerprint="a", limit=9),
            ],
            "is of other samples",
        ),
        (
            [
                record("top_k", 8, {"fact": 0.9}, base_digest="a"),
                record("top_k", 5, {"fact": 0.9}, base_digest="b"),
            ],
            "is of other base weights",
        ),
        (
            [
                TOP_8,
                gemoe(0).model_copy(update={"training": {"optim.lr": 0.1}}),
                gemoe(1).model_copy(update={"training": {"optim.lr": 0.2}}),
            ],
            r"seed 0 and seed 1 are both gemoe, and their trainings differ in optim.lr \(0.1, 0.2",
        ),
        ([record("top_k", 8, {"fact": 0.0})], "answers no question right"),
        (
            [TOP_8, record("top_k", 5, {"count": 0.9})],
            "num_questions_by_kind is {'count': 1000} in the evaluation of top_k k=5 seed=0 but",
        ),
        (
            [TOP_8, record("top_k", 5, {"count": 0.9, "fact": 0.7}, backbone_k=6)],
            "backbone_k is 6 in the evaluation of top_k k=5 seed=0 but 8 in that of top_k k=8",
        ),
    ],
)
def test_what_cannot_be_compared_is_named_in_one_line(records: list, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        build_results(records, command="")
    assert "\n" not in str(caught.value)


def test_rows_of_several_commits_name_all_of_them() -> None:
    def meta_commit(*commits: str | None) -> str | None:
        top = [
            record("top_k", 8 - i, {"fact": 0.9}, commit=commit) for i, commit in enumerate(commits)
        ]
        return build_results(top, command="").meta.commit

    assert meta_commit("a", "a") == "a"
    assert meta_commit("a", "b") == "a, b"
    assert meta_commit(None, None) is None
    assert meta_commit("a", None) == "a, unknown"


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    results = build_results([TOP_8, gemoe(0)], command="make demo")
    path = tmp_path / "results.json"
    write_text(path, results.model_dump_json())
    assert read_results(path) == results


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "results.json is missing"),
        ("{", "results.json is damaged"),
        ('{"rows": []}', "meta: Field required"),
    ],
)
def test_results_that_cannot_be_read(tmp_path: Path, text: str | None, expected: str) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=expected):
        read_results(path)


def test_results_without_the_baseline_are_refused(tmp_path: Path) -> None:
    results = build_results([TOP_8, gemoe(0)], command="")
    path = tmp_path / "results.json"
    write_text(path, Results(rows=results.rows[1:], meta=results.meta).model_dump_json())
    with pytest.raises(DataError, match="has no row of top_k with k=8"):
        read_results(path)
