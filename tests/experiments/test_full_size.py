"""A measurement at true size: what an earlier try has left."""

from __future__ import annotations

import pytest

from experiments.full_size import FullSize
from gemoe_ds.errors import ConfigError


def test_the_run_of_an_earlier_try_goes_when_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real, root = tmp_path / "model", tmp_path / "runs/full_size/olmoe"
    for folder in (real, root / "data", root / "run"):
        folder.mkdir(parents=True)
    (real / "config.json").write_text("{}")
    measured = FullSize("olmoe", 1, 2, real)
    with pytest.raises(ConfigError, match="run exists; .* --again"):
        measured.prepare()
    measured.prepare(again=True)
    assert [path.name for path in root.iterdir()] == ["data"]
