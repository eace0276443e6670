"""gemoe benchmark tables: folders in, report out; a wrong folder is one line and leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemoe_ds.cli.benchmark.tables import main
from tests.analysis.benchmarks.folders import demo_run
from tests.checkpoint.test_gates import write_checkpoint
from tests.cli.test_analyze import board_images

TASKS = {"scienceqa_img": 12, "gsm8k": 10}


def test_all_files_of_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out, board = demo_run(tmp_path / "run", TASKS), tmp_path / "a/out", tmp_path / "board"
    write_checkpoint(run / "checkpoints/step-000200", None)  # mode.json names it, from elsewhere
    main([str(run), "--out", str(out), "--html", "--tensorboard", str(board)])
    printed = capsys.readouterr()
    assert not printed.err and "Table 9: Language benchmarks" in printed.out
    results = json.loads((out / "results.json").read_text())
    figures = {figure["file"] for figure in results["figures"]}
    assert figures == {path.name for path in (out / "figures").iterdir()}
    assert "expert_similarity.png" in figures and len(figures) == 9
    report, page = ((out / name).read_text() for name in ("report.md", "report.html"))
    for name in figures:
        assert f"](figures/{name})" in report and f'alt="{name}"' in page
    assert sorted(path.name for path in out.glob("*.csv")) == [f"table_{n}.csv" for n in "129"]
    assert board_images(board) == {f"benchmarks/{name.removesuffix('.png')}" for name in figures}
    rows = {path.name for path in (board / "model_1").iterdir()}
    assert rows == {"Top-4_seed_0", "Top-2_seed_0", "GeMoE_seed_0", "GeMoE_seed_1"}


def test_a_checkpoint_that_is_gone_costs_one_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(demo_run(tmp_path / "run", {"gsm8k": 4}, seeds=1)), "--out", str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no figure of expert similarity: ") and "no manifest.json" in line
    assert (tmp_path / "out/report.md").exists() and not (tmp_path / "out/report.html").exists()


def test_mistakes_are_one_line_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = demo_run(tmp_path / "run", {"gsm8k": 4}, seeds=1)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for argv, says in (
        ([str(tmp_path / "empty"), "--out", str(tmp_path / "out")], "holds no benchmarks"),
        ([str(tmp_path / "file"), "--out", str(tmp_path / "out")], "is not there"),
        ([str(run), "--out", str(tmp_path / "file")], "File exists: choose another --out"),
        ([str(run)], "the following arguments are required: --out"),
        (["--out", str(tmp_path / "out")], "required: RUN"),
        (
            [str(run), "--out", str(tmp_path / "out"), "--tensorboard", str(tmp_path / "file")],
            "file: is a file; give a folder",
        ),
        ([str(run), "--out", str(tmp_path / "out"), "--htlm"], "did you mean --html?"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and says in line
    assert not (tmp_path / "out").exists()
