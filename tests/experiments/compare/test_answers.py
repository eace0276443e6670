"""What a contest has measured is collected from its runs, written, and read back."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.compare.answers import collect, left_to_run, read_answers, write_answers
from experiments.compare.jobs import Job, Plan, preparation
from experiments.compare.trials import choose, read_trials, record_of, taken, write_trials
from experiments.steps import Progress
from gemoe_ds.analysis.questions import Questions
from gemoe_ds.analysis.record import write_record
from gemoe_ds.errors import ConfigError, DataError
from tests.analysis.evaluations import record, sums_of
from tests.experiments.compare.planted import GRID, TRIALS, grid, planted
from tests.helpers import repository


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    monkeypatch.chdir(repository())


def leave(
    folder: Path, mean_k: float, right: list[bool], method: str, k: int | None = None
) -> None:
    """As an evaluation does."""
    questions = Questions.of((row, 0, "x", bit) for row, bit in enumerate(right))
    made = record(
        method,
        k,
        {"x": sum(right) / len(right)},
        num_questions_by_kind={"x": len(right)},
        mean_k_per_layer=(mean_k - 0.5, mean_k + 0.5),
    )
    sums = sums_of(np.ones((2, 3)), np.full((2, 3), 8), np.zeros(3, bool))
    write_record(folder, made, sums, questions)


def done(jobs: list[Job], folder: Path) -> Progress:
    """As if these had just ended."""
    progress = Progress(folder / "steps", [*preparation(), *(job.step for job in jobs)])
    for job in jobs:
        job.step.output.mkdir(parents=True, exist_ok=True)
        progress.finish(job.step)
    return progress


def test_runs_are_collected_written_and_read_back(tmp_path):
    made = grid()
    jobs = Plan(made, made.full, {}, tmp_path).contest(["static", "gemoe"], ["first"], [0])
    static, gemoe, captions = jobs
    for k, folder in zip((8, 4, 2), static.records, strict=True):
        leave(folder, k, [True] * k + [False] * (9 - k), "static", k)
    for k, folder in zip(made.full.budgets, gemoe.records, strict=True):
        leave(folder, k + 0.01, [False] * 9, "gemoe")
    progress = done(jobs, tmp_path)
    progress.begin(captions.step)
    answers = collect(made, jobs, {}, progress, is_quick=False, command="make compare")
    assert answers.contest.missing == (captions.step.name,)
    curves = answers.curves("first", "mixed")
    assert [p.mean_k for p in curves["static"][None]] == [8, 4, 2]
    assert [int(p.right_Q.sum()) for p in curves["static"][None]] == [8, 4, 2]
    assert [p.mean_k for p in curves["gemoe"][0]] == pytest.approx([2.81, 4.01, 6.21])
    assert [m.value for m in answers.contest.measured[:3]] == [8, 4, 2]
    write_answers(tmp_path / "out", answers)
    read = read_answers(tmp_path / "out")
    assert read.contest == answers.contest
    assert np.array_equal(read.right_PQ, answers.right_PQ)
    assert np.array_equal(read.asked.row_Q, answers.asked.row_Q)
    leave(gemoe.records[0], 3, [False] * 8, "gemoe")
    with pytest.raises(DataError, match="answers to other questions"):
        collect(made, jobs, {}, progress, is_quick=False, command="")
    with pytest.raises(DataError, match="no run of this contest is done yet"):
        collect(made, [captions], {}, progress, is_quick=False, command="")


def test_another_machine_goes_on_from_answers_that_are_kept(tmp_path):
    """It has none of the folders; a run whose gates are needed is made again."""
    made = grid()
    rows = ["tuned", "score", "gemoe"]
    plan = Plan(made, made.full, {}, tmp_path / "runs")
    jobs = plan.contest(rows, ["first"], [0], ["mixed"])
    for number, job in enumerate(jobs):
        for folder in job.records:
            leave(folder, 4, [True] * number + [False] * (9 - number), job.row)
    there = collect(made, jobs, {}, done(jobs, tmp_path), is_quick=False, command="")
    write_answers(tmp_path / "out", there)
    shutil.rmtree(tmp_path / "runs")
    kept = read_answers(tmp_path / "out")
    here = Progress(tmp_path / "here", [*preparation(), *(job.step for job in jobs)])
    assert not left_to_run(jobs, here, kept)
    again = collect(made, jobs, {}, here, kept, is_quick=False, command="")
    assert again.contest == there.contest and np.array_equal(again.right_PQ, there.right_PQ)
    rule = grid(rows=GRID["rows"] | {"score": GRID["rows"]["score"] | {"router": {"name": "mass"}}})
    jobs = Plan(rule, rule.full, {}, tmp_path / "runs").contest(rows, ["first"], [0], ["mixed"])
    here = Progress(tmp_path / "here", [*preparation(), *(job.step for job in jobs)])
    left = [job.step.name for job in left_to_run(jobs, here, kept)]
    assert left == ["first_mixed_tuned_8_seed_0", "first_mixed_score_seed_0"]
    again = collect(rule, jobs, {}, here, kept, is_quick=False, command="")
    assert again.contest.missing == ("first_mixed_score_seed_0",)


def test_damaged_answers(tmp_path):
    answers = planted({("first", "mixed"): {"static": 0.7}})
    write_answers(tmp_path, answers)
    contest = answers.contest.model_copy(update={"measured": answers.contest.measured[:1]})
    (tmp_path / "contest.json").write_text(contest.model_dump_json())
    with pytest.raises(DataError, match="3 evaluations, 1 in contest.json"):
        read_answers(tmp_path)
    (tmp_path / "contest.json").write_text(answers.contest.model_dump_json())
    (tmp_path / "answers.npz").write_bytes(b"noise")
    with pytest.raises(DataError, match="answers.npz is missing or damaged .*: run python"):
        read_answers(tmp_path)
    (tmp_path / "contest.json").unlink()
    with pytest.raises(DataError, match="contest.json is missing: run python -m experiments.com"):
        read_answers(tmp_path)


def test_a_trial_is_measured_by_what_it_has_above_static_k(tmp_path):
    """The second setting has fewer right answers, but far fewer experts."""
    made = grid()
    jobs = Plan(made, made.full, {}, tmp_path).trials(["gemoe", "free"])
    for k, folder in zip((8, 4, 2), jobs[0].records, strict=True):
        leave(folder, k, [True] * k + [False] * (10 - k), "static", k)
    outcomes = [(7, 8), (3, 6), (5, 4), (6, 4), (7, 8), (8, 8), (5, 4), (6, 4)]  # mixed, captions
    for job, (mean_k, right) in zip(jobs[1:], outcomes, strict=True):
        leave(job.records[0], mean_k, [True] * right + [False] * (10 - right), job.row)
    progress = done(jobs, tmp_path)
    tried = choose(made, jobs, progress)
    assert [t.above_static for t in tried["gemoe mixed"].trials] == pytest.approx([0.1, 0.3])
    assert {key: found.taken for key, found in tried.items()} == {
        "gemoe mixed": 1,
        "free mixed": 0,
        "gemoe captions": 0,
        "free captions": 0,
    }
    assert taken(tried) == {key: TRIALS[found.taken] for key, found in tried.items()}
    progress.begin(jobs[-1].step)
    assert set(choose(made, jobs, progress)) == {*tried} - {"free captions"}, "one is not done"
    path = record_of(tmp_path / "some.yaml")
    write_trials(path, tried)
    assert path.name == "some_trials.json" and read_trials(path, made) == tried
    rows = made.rows | {"gemoe": made.rows["gemoe"].model_copy(update={"trials": TRIALS[::-1]})}
    left = read_trials(path, made.model_copy(update={"rows": rows}))
    assert set(left) == {"free mixed", "free captions"}, "others now"
    assert read_trials(tmp_path / "none.json", made) == {}
    path.write_text("{")
    with pytest.raises(ConfigError, match="is damaged .*: run --trials again"):
        read_trials(path, made)


def test_what_retention_is_measured_against():
    answers = planted({("first", "mixed"): {"tuned": 0.7}})
    control = answers.control("first", "mixed")
    assert set(control) == {0, 1, 2}
    same = [m.value == 8 for m in answers.contest.measured]
    assert np.array_equal(np.stack([*control.values()]), answers.right_PQ[same])
    assert replace(answers, contest=answers.contest).control("second", "mixed") == {}
