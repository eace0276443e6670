"""gemoe benchmark score: stored answers in, scores out; what is missing is one line, code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemoe_ds.cli.benchmark.score import main
from gemoe_ds.evaluation.benchmarks.local_data import DataPlaces
from gemoe_ds.evaluation.benchmarks.task_options import TaskOptions
from tests.evaluation.benchmarks.conftest import miniature
from tests.evaluation.benchmarks.gold import answer_with

__all__ = ["miniature"]


def test_a_run_is_scored(
    miniature: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = TaskOptions(data=DataPlaces(miniature))
    answer_with(tmp_path / "run/benchmarks", ["gsm8k", "ocrbench"], options)
    main([str(tmp_path / "run"), "--data-root", str(miniature)])
    said = capsys.readouterr()
    assert "trained/gsm8k: exact_match,strict-match 1.0000" in said.out
    assert "warning: trained/ocrbench: the harness divides by 1,000" in said.err
    scores = json.loads((tmp_path / "run/benchmarks/trained/gsm8k/scores.json").read_bytes())
    assert scores["metrics"]["exact_match,flexible-extract"] == 1.0


@pytest.fixture(scope="module")
def answered(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("answered") / "out"
    answer_with(out, ["gsm8k", "humaneval"], TaskOptions(data=DataPlaces(miniature)))
    return out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is not there"),
        (["."], "holds no benchmarks"),
        (["out", "--tasks", "pope"], "no answers to these tasks"),
        (["out"], "humaneval runs programs that the model has written"),
        (["out", "--tasks", "gsm8k", "--data-root", "nowhere"], "--data-root nowhere: no such"),
        (["out", "--tasks", "gsm8k", "--data-root", "empty"], "hf download --repo-type dataset"),
        (["out/trained/gsm8k"], "holds no benchmarks"),
    ],
)
def test_what_is_missing_is_one_line(
    answered: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(answered)
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr()
    error = said.err.strip().splitlines()[-1]
    assert ended.value.code == 2 and error.startswith("error: ") and message in error
    assert not list(answered.rglob("scores.json"))
