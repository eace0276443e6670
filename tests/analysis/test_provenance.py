"""Where a result comes from."""

from __future__ import annotations

from pathlib import Path

from gemoe_ds.analysis.provenance import named_from_here, provenance
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
