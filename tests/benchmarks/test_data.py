"""The benchmark of the data, in small: every part has its figures, and keeps the others'."""

from __future__ import annotations

import json

import pytest

from benchmarks import data


@pytest.mark.slow
def test_figures_of_every_part(tmp_path):
    out = tmp_path / "data.json"
    small = ["--rows", "9", "--large", "300", "--rounds", "1", "--out", str(out)]
    data.main(["--parts", "conversion", "cold", *small])
    data.main(["--parts", "memory", *small])
    found = json.loads(out.read_text())
    first, *rows = found["conversion"]
    assert first["bytes_a_picture"] > 20_000
    names = ["decoding alone", "llava json", "parquet", "webdataset", "text"]
    assert [row["what"] for row in rows] == names
    assert all(row["rows_a_second"] > 0 for row in rows)
    assert all(0 < row["of_decoding"] < 1 for row in rows[1:4])
    assert found["cold"]["bytes_read"] >= found["cold"]["bytes_of_the_picture"] > 20_000
    assert found["memory"]["rows"] == 300 and 50 < found["memory"]["peak_mb"] < 400
    assert found["commit"] and found["machine"] and found["command"]


def test_a_place_for_the_results_that_is_none_is_one_line(tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{")
    for out in (tmp_path / "none/data.json", tmp_path / "bad.json"):
        with pytest.raises(SystemExit):
            data.main(["--parts", "cold", "--rows", "1", "--out", str(out)])
        assert str(out) in capsys.readouterr().err
