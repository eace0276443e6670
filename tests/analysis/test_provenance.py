"""Where a result comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path

from gemoe_ds.analysis.provenance import commit_of, named_from_here, provenance
from tests.analysis.evaluations import record


def test_provenance_fills_the_fields_of_a_record() -> None:
    where = provenance()
    assert set(where) == {"command", "commit", "machine", "date"}
    assert " x " in where["machine"]
    assert where["date"].endswith("+00:00")
    assert record("top_k", 8, {"fact": 0.9}, **where).command == where["command"]


def test_a_path_within_the_working_directory_says_nothing_of_the_machine(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert named_from_here(tmp_path / "runs/a/step-1") == "runs/a/step-1"
    assert named_from_here("runs/a") == "runs/a"
    assert named_from_here("/elsewhere/b") == "/elsewhere/b"
    assert named_from_here(None) == "None"


def test_what_a_run_wrote_into_results_does_not_make_a_commit_dirty(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    (tmp_path / "results").mkdir()
    files = tmp_path / "code.py", tmp_path / "results/a.json"
    for file in files:
        file.write_text("1")
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm one"):
        assert commit_of(tmp_path) is None
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    clean = commit_of(tmp_path)
    assert clean and len(clean) == 40
    files[1].write_text("2")
    assert commit_of(tmp_path) == clean
    files[0].write_text("2")
    assert commit_of(tmp_path) == f"{clean}-dirty"
