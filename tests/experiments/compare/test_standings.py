"""Standings are what the paired statistics give for the right curves."""

from __future__ import annotations

import pytest

from experiments.compare.standings import standings
from gemoe_ds.analysis.paired import Bootstrap
from tests.experiments.compare.planted import ASKED, planted

LEVELS = {"static": 0.7, "tuned": 0.72, "score": 0.8, "gemoe": 0.75, "free": 0.72}


def test_figures_differences_and_retention():
    bootstrap = Bootstrap(ASKED, resamples=100)
    captions = {"tuned": 0.6, "score": 0.65}
    answers = planted({("first", "mixed"): LEVELS, ("first", "captions"): captions})
    found = standings(answers, bootstrap, "first")
    assert found.rows() == list(LEVELS)
    assert found.at["score", 3.0].to_ours is None and found.at["gemoe", 4.0].to_reference is None
    assert found.reasons["free", 3.0].endswith("from 3.50 to 5.20")
    by_hand = bootstrap.at(answers.curves("first", "mixed")["gemoe"], 5.0)
    assert found.at["gemoe", 5.0].accuracy == bootstrap.estimate(by_hand)
    assert found.at["gemoe", 5.0].accuracy.seeds == 3
    assert found.at["gemoe", 5.0].to_ours.value == pytest.approx(-0.05, abs=0.01)
    kept = found.retention["score", 0.5]
    assert kept.value == pytest.approx(0.8 / 0.72, abs=0.02) and kept.low < kept.value < kept.high
    assert ("free", 0.7) not in found.retention
    other = standings(answers, bootstrap, "first", "captions")
    assert other.rows() == ["static", "tuned", "score"], "static is the same; nobody trained it"
    assert other.at["static", 4.0].accuracy == found.at["static", 4.0].accuracy
    assert other.at["score", 4.0].accuracy.value == pytest.approx(0.65, abs=0.01)
