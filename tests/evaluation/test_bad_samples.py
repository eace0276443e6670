"""Evaluation and generation on samples of which some cannot be used, or are cut."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gemoe_ds.data.sample import Turn, open_samples, write_samples
from gemoe_ds.errors import DataError
from tests.evaluation.test_score import scored, setting  # noqa: F401


@pytest.fixture
def harmed(setting, tmp_path):  # noqa: F811
    """Rows 1 (broken image) and 4 (no room for an answer) of 11; of 6 an answer is cut."""
    model, good, collator = setting
    samples = [good[row] for row in range(len(good))]
    samples[1] = replace(samples[1], image=samples[1].image[:60])
    samples[4] = replace(samples[4], turns=(Turn("a " * 90, "b", "x"), Turn("c", "d", "y")))
    samples[6] = replace(samples[6], turns=(samples[6].turns[0], Turn("c", "d " * 90, "y")))
    write_samples(iter(samples), tmp_path / "data", source="test")
    return model, open_samples(tmp_path / "data"), collator


@pytest.mark.parametrize("batch, world", [(1, 1), (4, 1), (3, 2)])
def test_what_is_not_asked_is_counted_apart(setting, harmed, batch, world):  # noqa: F811
    scores, whole = scored(harmed, batch, world), scored(setting, 2)
    assert whole.asked == {"x": 11, "y": 11} and not whole.not_asked and not whole.bad
    assert scores.asked == {"x": 9, "y": 8} and scores.not_asked == {"x": 2, "y": 3}
    assert sorted(scores.bad) == [1, 4] and scores.bad[4].needs > 90
    assert scores.bad[1].reason.startswith("sample s1: its image cannot be decoded")


def test_where_nothing_can_be_asked_a_line_says_so(harmed):
    model, samples, collator = harmed
    collator.max_length, kept = 4, collator.max_length
    try:
        with pytest.raises(DataError, match="none of 22 questions can be asked, raise data.max_le"):
            scored((model, samples, collator), 4)
    finally:
        collator.max_length = kept
