"""`make results`: what runs, what is left out, what is noted, and the page that comes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.release import __main__ as release
from experiments.release.claim import ByHand, Claim, state
from experiments.release.origin import origin
from experiments.release.page import page
from experiments.release.ran import has_ended, read_ran
from experiments.release.source import source_hash
from experiments.release.stages import STAGES, WANTED, Stage, lacking, stage_of
from gemoe_ds.errors import ConfigError, DataError
from tests.helpers import repository


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout with one file of source, in which `measure` works."""
    (tmp_path / "results").mkdir()
    (tmp_path / "experiments/grids").mkdir(parents=True)
    (tmp_path / "experiments/grids/a.yaml").write_text("a: 1\n")
    (tmp_path / "code.py").write_text("one = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "config", "user.email", "a@b.c")
    git(tmp_path, "config", "user.name", "A")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(release, "CHECKOUT", tmp_path)
    return tmp_path


def git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout


def writing(name: str, file: str) -> Stage:
    code = f"import pathlib; pathlib.Path({file!r}).write_text('1')"
    return Stage(name, f'python -c "{code}"', 1, (Path(file).name,))


def test_stages_make_files_that_no_other_makes_and_name_what_is_known() -> None:
    made = [name for stage in STAGES for name in stage.makes]
    assert len(made) == len(set(made))
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    assert {name for stage in STAGES for name in stage.wants} <= set(WANTED)


def test_what_a_stage_starts_is_there() -> None:
    root = repository()
    targets = (root / "Makefile").read_text(encoding="utf-8")
    for stage in STAGES:
        program, *words = stage.command.split()
        if program == "make":
            assert f"\n{words[0]}:" in targets, stage
        elif program == "python":
            module = root / words[1].replace(".", "/")
            assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), stage


def test_every_results_file_is_made_by_a_stage() -> None:
    root = repository() / "results"
    files = [str(file.relative_to(root)) for file in root.rglob("*.json")]
    assert [file for file in files if stage_of(file) is None and file != "stages.json"] == []


def test_a_stage_runs_once_for_a_source_is_noted_and_committed(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / "other.txt").write_text("somebody's work")
    git(checkout, "add", "other.txt")
    source = source_hash(checkout)
    stage = writing("speed", "results/speed.json")
    assert release.measure([stage], source, commit=True) == 0
    ran = read_ran(checkout / "results")["speed"]
    assert (ran.source, ran.command) == (source, stage.command)
    assert (
        git(checkout, "log", "-1", "--format=%s").strip() == f"Results of speed on source {source}"
    )
    assert "other.txt" not in git(checkout, "show", "--stat", "HEAD")
    assert source_hash(checkout) == source, "results are no source"
    assert "all done" in capsys.readouterr().out


def test_a_stage_that_fails_has_not_ended_and_the_others_run(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [
        writing("first", "results/a.json"),
        Stage("second", 'python -c "raise SystemExit(3)"', 1),
        writing("third", "results/b.json"),
    ]
    source = source_hash(checkout)
    assert release.measure(stages, source, commit=False) == 3
    assert "failed: second" in capsys.readouterr().err
    ran = read_ran(checkout / "results")
    assert [has_ended(ran, stage, source) for stage in stages] == [True, False, True]
    assert (checkout / "results/b.json").exists()


def test_a_stage_begins_anew_on_another_source_and_goes_on_on_the_same(checkout: Path) -> None:
    count = "import pathlib; p = pathlib.Path('kept'); p.mkdir(exist_ok=True); "
    count += "(p / str(len(list(p.iterdir())))).touch(); raise SystemExit(1)"
    stage = Stage("a", f'python -c "{count}"', 1, anew=("kept", "no_such_file"))
    (checkout / "kept").mkdir()
    (checkout / "kept/of_another_source").touch()
    for tries in (1, 2):
        release.measure([stage], source_hash(checkout), commit=False)
        assert {path.name for path in (checkout / "kept").iterdir()} == {*map(str, range(tries))}
    (checkout / "code.py").write_text("one = 2\n")
    release.measure([stage], source_hash(checkout), commit=False)
    assert [path.name for path in (checkout / "kept").iterdir()] == ["0"]


def test_a_stage_in_which_the_source_changes_counts_for_no_source(checkout: Path) -> None:
    assert release.measure([writing("x", "code.py")], source_hash(checkout), commit=False) == 1
    ran = read_ran(checkout / "results")
    assert ran["x"].seconds is None


def test_the_source_is_code_and_no_prose(checkout: Path) -> None:
    before = source_hash(checkout)
    for aside in ("results/a.json", "README.md", "experiments/release/x.py", "docs/a.txt"):
        (checkout / aside).parent.mkdir(parents=True, exist_ok=True)
        (checkout / aside).write_text("1")
        git(checkout, "add", aside)
    assert source_hash(checkout) == before
    (checkout / "code.py").write_text("one = 2\n")
    assert source_hash(checkout) != before


def test_what_a_machine_lacks_is_named_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WANTED, "eval-env", (lambda: False, "make eval-env"))  # type: ignore[arg-type]
    assert lacking(Stage("a", "make a", 1, wants=("eval-env",))) == ["eval-env (make eval-env)"]
    assert lacking(Stage("a", "make a", 1)) == []


def test_parts_are_chosen_in_order_and_unknown_ones_are_refused() -> None:
    assert [stage.name for stage in release.chosen(["parity", "demo"])] == ["demo", "parity"]
    with pytest.raises(ConfigError, match="--only nope: there are test, demo"):
        release.chosen(["nope"])


def test_python_is_this_interpreter() -> None:
    assert release.command_of(Stage("a", "python -m x", 1)) == [sys.executable, "-m", "x"]
    assert release.command_of(Stage("a", "make x", 1)) == ["make", "x"]


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(DataError, match=r"stages.json is no record"):
        read_ran(tmp_path)


def test_the_page_says_what_is_of_this_source(checkout: Path) -> None:
    source = source_hash(checkout)
    made = {"rows": [{"ms": 5, "commit": "abc-dirty", "machine": "2 x CPU", "date": "2026-11-01T"}]}
    (checkout / "results/parity.json").write_text(json.dumps(made | {"command": "make old"}))
    (checkout / "README.md").write_text("It takes 5 ms | 3 GiB")
    claims = [
        Claim("README.md", lambda r: f"{r.row('parity.json')['ms']} ms"),
        Claim("README.md", "| 3 GiB", ByHand("by eye", "def", "", "2026-10-01")),
    ]
    stated = [state(claim, checkout / "results") for claim in claims]
    old = page(checkout, stated, {}, source)
    assert "**0 of 2 claims were measured on it.**" in old
    row = "| [README.md](../README.md) | 5 ms | [parity.json](parity.json) | "
    assert row + "`make old` | `abc-dirty` | 2 x CPU | 2026-11-01 | no |" in old
    assert r"| \| 3 GiB | by hand | `by eye` | `def` |  | 2026-10-01 | no |" in old
    (parity,) = (stage for stage in STAGES if stage.name == "parity")
    assert release.measure([_quick(parity)], source, commit=False) == 0
    new = page(checkout, stated, read_ran(checkout / "results"), source)
    assert "**1 of 2 claims were measured on it.**" in new
    assert "| this one |" in new


def _quick(stage: Stage) -> Stage:
    return Stage(stage.name, 'python -c "pass"', 1, stage.makes)


def test_a_file_without_a_word_comes_from_the_commit_that_brought_it(checkout: Path) -> None:
    (checkout / "results/a.md").write_text("table")
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "second")
    assert origin(checkout, "a.md").commit == git(checkout, "rev-parse", "HEAD").strip()
