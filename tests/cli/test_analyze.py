"""launch/analyze.py: folders in, report out; a wrong folder is one line and leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemoe_ds.analysis.ablation import write_ablation
from gemoe_ds.analysis.record import write_record
from gemoe_ds.cli.analyze import main
from tests.analysis.evaluations import ablation_of, evaluation, pairs_of
from tests.helpers import run_here


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Top-8, top-5 and GeMoE."""
    made = [evaluation("top_k", 8, 0), evaluation("top_k", 5, 1.4), evaluation("gemoe", None, 0.2)]
    for record, sample in made:
        write_record(tmp_path / "eval" / f"{record.method}_{record.k}", record, sample)
    return sorted(map(str, (tmp_path / "eval").iterdir()))


def test_the_report_its_figures_and_the_table(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, board = tmp_path / "runs" / "demo", tmp_path / "board"
    flags = ["--command", "make demo", "--seconds", "61"]
    main([*folders, "--out", str(out), "--tensorboard", str(board), *flags])
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[2:]] == ["Top-8", "Top-5", "GeMoE"]

    results = json.loads((out / "results.json").read_text())
    assert [(row["method"], row["k"], row["seed"]) for row in results["rows"]] == [
        ("gemoe", None, 0),
        ("top_k", 5, 0),
        ("top_k", 8, 0),
    ]
    asked = {"accuracy", "accuracy_by_kind", "mean_k", "activated_parameters", "retention"}
    assert asked | {"sparsity", "spearman_per_layer"} <= set(results["rows"][0])
    assert results["meta"]["command"] == "make demo"
    assert results["meta"]["seconds"] == 61

    report = (out / "report.md").read_text(encoding="utf-8")
    pictures = sorted(path.name for path in (out / "figures").iterdir())
    assert len(pictures) == 6
    for name in pictures:
        assert f"](figures/{name})" in report
    assert board_images(board) == {f"report/{Path(name).stem}" for name in pictures}


def test_a_measured_ablation_is_in_the_report(folders: list[str], tmp_path: Path) -> None:
    write_ablation(Path(folders[0]), ablation_of(pairs_of(), method="gemoe", k=None), pairs_of())
    main([*folders, "--out", str(tmp_path / "out")])
    report = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "## What a dropped expert costs" in report and "### GeMoE, seed 0" in report
    assert "](figures/dropped_expert_cost.png)" in report
    main(["--results", str(tmp_path / "out/results.json"), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again/report.md").read_text(encoding="utf-8") == report


def board_images(folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return set(events.Tags()["images"])


def test_the_report_is_rendered_again_from_results_alone(
    folders: list[str], tmp_path: Path
) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    main([*folders, "--out", str(first)])
    for path in (tmp_path / "eval").rglob("*.*"):
        path.unlink()
    report = (first / "report.md").read_bytes()
    (first / "report.md").unlink()
    main(["--results", str(first / "results.json"), "--out", str(first)])
    assert (first / "report.md").read_bytes() == report

    main(["--results", str(first / "results.json"), "--out", str(second)])
    assert (second / "report.md").read_bytes() == report
    for path in (first / "figures").iterdir():
        assert (second / "figures" / path.name).read_bytes() == path.read_bytes()

    bare = tmp_path / "results.json"  # away from its figures
    (first / "results.json").rename(bare)
    main(["--results", str(bare), "--out", str(third)])
    assert "![" not in (third / "report.md").read_text(encoding="utf-8")


def test_a_missing_baseline_is_one_line_and_leaves_nothing(
    folders: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    chosen = [folder for folder in folders if not folder.endswith("top_k_8")]
    done = run_here(main, *chosen, "--out", out)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no evaluation of top_k with k=8 is among those given")
    assert not list(out.rglob("*.*"))


@pytest.mark.parametrize(
    ("folder", "expected"), [("nowhere", "eval.json is missing"), ("eval", "eval.json is missing")]
)
def test_a_wrong_folder_is_one_line(
    folders: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    folder: str,
    expected: str,
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*folders, str(tmp_path / folder), "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and expected in line


def test_an_out_that_is_a_file_is_one_line(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        main([*folders, "--out", str(tmp_path / "file")])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {tmp_path}/file: File exists: choose another --out"


@pytest.mark.parametrize(
    "argv", [[], ["a", "--results", "b"], ["--results", "b", "--tensorboard", "c"]]
)
def test_flags_that_do_not_go_together(argv: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*argv, "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert not (tmp_path / "out").exists()
