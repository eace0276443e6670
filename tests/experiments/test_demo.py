"""The demo's driver: skips the done, repeats the changed, continues the interrupted."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest

from experiments.demo import demo_steps
from experiments.steps import Bar, Progress, Step, run_steps
from tests.helpers import repository, run_python


def append(output: Path, text: str, code: int = 0) -> tuple[str, ...]:
    """A command that appends to its output, so that every run shows, and ends with `code`."""
    return (
        "python",
        "-c",
        f"open({str(output)!r}, 'a').write({text!r}); raise SystemExit({code})",
    )


@pytest.fixture
def chain(tmp_path: Path) -> list[Step]:
    """Three steps; `b` can resume and reads a recipe; `c` needs `b`."""
    recipe = tmp_path / "b.yaml"
    recipe.write_text("steps: 1\n")
    a, b, c = (tmp_path / name for name in "abc")
    return [
        Step("a", append(a, "a"), a, 1),
        Step("b", append(b, "b"), b, 1, needs=("a",), recipe=recipe, resumable=True),
        Step("c", append(c, "c"), c, 1, needs=("b",)),
    ]


def run(steps: list[Step]) -> int:
    return run_steps(steps, Progress(steps[0].output.parent / "steps", steps))


def outputs(steps: list[Step]) -> list[str]:
    return [step.output.read_text() if step.output.exists() else "-" for step in steps]


def test_a_second_run_does_nothing(chain: list[Step], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(chain) == 0
    assert outputs(chain) == ["a", "b", "c"]
    assert "$ python -c" in capfd.readouterr().out
    assert run(chain) == 0
    assert outputs(chain) == ["a", "b", "c"]
    assert "3 of 3 steps are done already" in capfd.readouterr().out


def test_a_failure_stops_with_its_code_and_the_next_run_goes_on_from_there(
    chain: list[Step], capfd: pytest.CaptureFixture[str]
) -> None:
    failing = dataclasses.replace(chain[2], command=append(chain[2].output, "x", code=7))
    assert run([*chain[:2], failing]) == 7
    assert "step c failed (exit code 7)" in capfd.readouterr().err
    assert run(chain) == 0
    assert outputs(chain) == ["a", "b", "c"]  # the x of the failed try is gone


def test_only_a_resumable_step_keeps_what_an_interrupted_try_left(chain: list[Step]) -> None:
    progress = Progress(chain[0].output.parent / "steps", chain)
    for step in chain:
        progress.begin(step)
        step.output.write_text("half ")
    assert run(chain) == 0
    assert outputs(chain) == ["a", "half b", "c"]


def test_a_bar_over_all_steps_stands_before_each(
    chain: list[Step], capfd: pytest.CaptureFixture[str]
) -> None:
    """By the seconds that they are said to take; a run that goes on begins where it was."""
    failing = [chain[0], dataclasses.replace(chain[1], seconds=3, command=("false",)), chain[2]]
    assert run(failing) == 1
    lines = [line for line in capfd.readouterr().out.splitlines() if "|" in line]
    assert [line.split("|")[0] for line in lines] == ["==   0%", "==  20%"]
    assert lines[0].endswith("| step 1 of 3: a (about 0:05 on 2 cores)")
    assert "| step 2 of 3: b (0:00 so far, about 0:0" in lines[1]

    assert run([chain[0], dataclasses.replace(chain[1], seconds=3), chain[2]]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "|" in line]
    assert [line.split("|")[0] for line in lines] == ["==  20%", "==  80%", "== 100%"]
    assert "\r" not in "".join(lines) and "| all done in 0:00" in lines[-1]


def test_the_bar_is_plain_where_only_ascii_is(chain, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert Bar(chain, chain[1:]).before(chain[1]).isascii()
    assert "#" in Bar(chain, chain[1:]).before(chain[1])


@pytest.mark.parametrize("changed", ["b.yaml", "base.yaml"])
def test_a_changed_recipe_repeats_its_step_and_what_needs_it(
    chain: list[Step], tmp_path: Path, changed: str
) -> None:
    (tmp_path / "base.yaml").write_text("steps: 1\n")
    (tmp_path / "b.yaml").write_text("extends: base.yaml\n")
    assert run(chain) == 0
    for step in chain:
        step.output.write_text("old ")
    (tmp_path / changed).write_text("steps: 2\n")
    assert run(chain) == 0
    assert outputs(chain) == ["old ", "b", "c"]


def test_a_lost_output_is_made_again(chain: list[Step]) -> None:
    assert run(chain) == 0
    chain[0].output.unlink()
    assert run(chain) == 0
    assert outputs(chain) == ["a", "b", "c"]


def test_a_damaged_note_only_costs_time(chain: list[Step]) -> None:
    assert run(chain) == 0
    (chain[0].output.parent / "steps" / "c.json").write_text("{")
    assert run(chain) == 0
    assert outputs(chain) == ["a", "b", "c"]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_seeds_add_rows_and_leave_the_other_steps_as_they_are(num_ranks: int) -> None:
    one = demo_steps([0], num_ranks, Path("runs/demo"))
    three = demo_steps([0, 1, 2], num_ranks, Path("runs/demo"))
    added = {step.name for step in three} - {step.name for step in one}
    runs = {f"{method}_seed_{seed}" for method in ("gemoe", "threshold") for seed in (1, 2)}
    assert added == runs | {f"evaluate_{run}" for run in runs}
    commands = {step.name: step.command for step in one}
    for step in three:
        if step.name in commands and step.name != "report":
            assert step.command == commands[step.name]


def test_every_step_comes_after_what_it_needs_and_has_an_output_of_its_own() -> None:
    steps = demo_steps([0, 1, 2], 2, Path("results/demo"))
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert len({step.output for step in steps}) == len(steps)
    for position, step in enumerate(steps):
        assert set(step.needs) <= set(names[:position])


def test_listed_commands_name_scripts_and_recipes_that_exist() -> None:
    done = run_python("-m", "experiments.demo", "--list")
    assert done.returncode == 0 and "deepspeed --num_gpus" in done.stdout
    for line in done.stdout.splitlines():
        for word in line.split():
            if word.startswith(("launch/", "data_prep/", "experiments/")):
                assert (repository() / word).is_file(), word
