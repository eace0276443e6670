"""The report says what is in the figures, and what is not there."""

from __future__ import annotations

import json

from experiments.compare.__main__ import write_report
from experiments.compare.answers import write_answers
from tests.experiments.compare.planted import planted

LEVELS = {"static": 0.7, "tuned": 0.72, "score": 0.8, "gemoe": 0.75, "free": 0.72}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gemoe_ds.analysis.paired.RESAMPLES", 50)
    captions = {"tuned": 0.6, "score": 0.65, "gemoe": 0.6}
    answers = planted(
        {("first", "mixed"): LEVELS, ("second", "mixed"): LEVELS, ("first", "captions"): captions}
    )
    answers.contest.__dict__["missing"] = ("second_mixed_free_one_seed_0",)
    write_answers(tmp_path, answers)
    write_report(answers, tmp_path)
    said = capsys.readouterr().out
    text = (tmp_path / "report.md").read_text()
    assert said.splitlines()[1] in text and "**No row is significantly better than Ours" in said
    table = {row[0]: row for row in map(cells, text.splitlines()) if row[0] in ("**Ours**", "Free")}
    assert table["Free"], "the last table it stands in"
    first = [
        cells(line) for line in text.split("## The same mean k")[1].splitlines() if "|" in line
    ]
    by_label = {}
    for row in first:
        by_label.setdefault(row[0], row)
    assert by_label["Free"][1:3] == ["for each free", "- (has 3.50 to 5.20)"]
    assert by_label["Static"][1] == "nothing" and by_label["**Ours**"][1] == "gates of tuned 8"
    assert by_label["GeMoE"][2].startswith("74.") and "[" in by_label["GeMoE"][2]
    to_ours = text.split("### Difference to Ours")[1].split("###")[0]
    (gemoe,) = (cells(line) for line in to_ours.splitlines() if line.startswith("| GeMoE"))
    assert gemoe[1].startswith("-4.") and gemoe[1].endswith("*")
    for title in ("## Trained on captions only", "## second", "## Rules", "## Trials"):
        assert title in text
    assert "**1 runs are missing**: second_mixed_free_one_seed_0" in text
    assert "+1.00 | yes" in " ".join(text.split()) and "No trials were run" not in text
    standings = json.loads((tmp_path / "standings.json").read_text())
    assert standings[0]["at"]["gemoe 3"]["to_ours"]["seeds"] == 3
    for name in ("fronts", "differences"):
        assert (tmp_path / f"figures/{name}.png").stat().st_size > 10_000
        assert f"(figures/{name}.png)" in text


def test_a_contest_without_trials_and_with_one_row_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("gemoe_ds.analysis.paired.RESAMPLES", 20)
    write_report(planted({("first", "mixed"): {"gemoe": 0.7}}, tried=False), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "**No trials were run for gemoe mixed**" in text
    assert "**Ours has no figure at any mean k from 3 to 6.**" in text
    assert "tuned 8 is not among the runs that are done" in text
