"""The plan of a contest: what is run, in which order, from what, and what makes it run again."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.compare.jobs import Plan, preparation
from experiments.steps import Progress
from gemoe_ds.config import parse_cli
from gemoe_ds.evaluation.arguments import check_evaluation, evaluate_parser
from tests.experiments.compare.planted import GRID, grid
from tests.helpers import repository

ROWS = list(GRID["rows"])
BOTH = ["first", "second"]


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    monkeypatch.chdir(repository())


def plan(made=None, quick=False, taken=()) -> Plan:
    made = made or grid()
    return Plan(made, made.quick if quick else made.full, dict(taken), Path("runs/x"))


def test_a_whole_contest():
    jobs = plan().contest(ROWS, BOTH, [0, 1, 2])
    names = [job.step.name for job in jobs]
    assert len(names) == len(set(names))
    of_seed = ["tuned_8", "tuned_4", "tuned_2", "score", "gemoe", "free_nine", "free_one"]
    main = [f"first_mixed_{run}_seed_{seed}" for seed in (0, 1, 2) for run in of_seed]
    other = [f"second_mixed_{run}_seed_0" for run in ("static", *of_seed)]
    captions = ["tuned_8", "tuned_2", "score", "gemoe", "free_nine", "free_one"]
    assert names == [
        "first_mixed_static_seed_0",
        *main,
        *other,
        *(f"first_captions_{run}_seed_0" for run in captions),
    ]
    done = {step.name for step in preparation()}
    for job in jobs:
        assert set(job.step.needs) <= done, "a step comes after those that it needs"
        done.add(job.step.name)
    (score,) = (job for job in jobs if job.step.name == "second_mixed_score_seed_0")
    assert "second_mixed_tuned_8_seed_0" in score.step.needs


def test_every_command_is_one_that_gemoe_takes():
    made = plan()
    for job in [*made.contest(ROWS, BOTH, [0, 1]), *made.trials(ROWS)]:
        words = list(job.step.command[3:])
        row = made.grid.rows[job.row]
        if row.trains:
            cut = words.index("--then")
            config, _ = parse_cli(words[1:cut])
            assert (
                config.output_dir.endswith(str(job.step.output)) and config.seed == job.where.seed
            )
            assert config.model.checkpoint.endswith(made.grid.backbones[job.where.backbone])
            assert config.data.train_path.endswith(made.grid.training[job.where.training])
            assert config.train.steps == 250 and config.parallel.ep_size == 1
            words = words[cut + 1 :]
        assert words[0] == "evaluate"
        asked = evaluate_parser(None).parse_args(words[1:])
        check_evaluation(asked)
        assert asked.data.name == ("test" if job.where.trial is None else "validation")
        assert all(folder.is_relative_to(asked.out) for folder in job.records)
        assert len(job.records) == len(asked.mean_k or asked.k or [None])
        assert asked.name == job.row


def test_a_quick_one_and_parts():
    names = [job.step.name for job in plan(quick=True).contest(ROWS, ["first"], [0])]
    runs = ["static", "tuned_4", "tuned_8", "score", "gemoe", "free_nine"]
    assert names == [f"first_mixed_{run}_seed_0" for run in runs], "score takes tuned_8's gates"
    names = [job.step.name for job in plan().contest(["score"], ["second"], [0])]
    assert names == ["second_mixed_tuned_8_seed_0", "second_mixed_score_seed_0"]
    parts = [plan().contest(ROWS, BOTH, [0, 1], [training]) for training in ("mixed", "captions")]
    assert sum(parts, []) == plan().contest(ROWS, BOTH, [0, 1])


def test_trials_try_every_setting_and_the_contest_takes_what_they_chose():
    jobs = plan().trials(ROWS)
    names = [job.step.name for job in jobs]
    assert names == [
        "trials_mixed_static_0",
        *(
            f"trials_{training}_{run}_{number}"
            for training in ("mixed", "captions")
            for run in ("tuned_4", "gemoe", "free_one")
            for number in (0, 1)
        ),
    ]
    assert "optim.lr=0.0003" in jobs[1].step.command and "optim.lr=0.001" in jobs[2].step.command
    left = plan().trials(ROWS, ["mixed"], done=["gemoe mixed", "free captions"])
    assert [job.step.name for job in left] == [
        "trials_mixed_static_0",
        *(f"trials_mixed_{run}_{number}" for run in ("tuned_4", "free_one") for number in (0, 1)),
    ]
    first = plan().contest(["gemoe"], ["first"], [0])[0].step
    chosen = plan(taken={"gemoe mixed": {"optim.lr": 0.5}}.items()).contest(
        ["gemoe"], ["first"], [0]
    )
    assert "optim.lr=0.0003" in first.command and "optim.lr=0.5" in chosen[0].step.command


def test_a_changed_setting_starts_anew_and_so_does_what_needs_it(tmp_path):
    before = preparation()

    def done(made: Plan) -> list[str]:
        jobs = made.contest(["tuned", "score", "gemoe"], ["first"], [0])
        progress = Progress(tmp_path, [*before, *(job.step for job in jobs)])
        found = [job.step.name for job in jobs if progress._state(job.step) == "done"]
        for job in jobs:
            progress._write(job.step, "done")
        return found

    assert done(plan()) == []
    assert len(done(plan())) == 9, "five, and four on captions"
    setting = {"optim.lr": 0.5}
    changed = plan(taken={"tuned mixed": setting, "tuned captions": setting}.items())
    assert {name.split("_")[2] for name in done(changed)} == {"gemoe"}
