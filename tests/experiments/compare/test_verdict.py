"""The sentences follow from planted figures, whoever wins."""

from __future__ import annotations

import pytest

from experiments.compare.standings import standings
from experiments.compare.verdict import verdict
from gemoe_ds.analysis.paired import Bootstrap
from tests.experiments.compare.planted import ASKED, planted

MAIN, SECOND, CAPTIONS = ("first", "mixed"), ("second", "mixed"), ("first", "captions")
EQUAL = {"static": 0.70, "tuned": 0.70, "score": 0.80, "gemoe": 0.75, "free": 0.72}


@pytest.fixture(scope="module")
def bootstrap() -> Bootstrap:
    return Bootstrap(ASKED, resamples=300)


def sentences(bootstrap: Bootstrap, levels: dict, **changed) -> list[str]:
    answers = planted(levels, **changed)
    main, *others = [standings(answers, bootstrap, *where) for where in levels]
    return verdict(answers.contest.grid, main, others)


def test_ours_wins(bootstrap):
    best, above, below, *rest = sentences(bootstrap, {MAIN: EQUAL})
    assert best.startswith("The best figures: Ours ") and "GeMoE" not in best
    assert above.startswith(
        "**No row is significantly better than Ours at k 3, 4, 5, 6** (14 comparisons"
    )
    assert "Ours is significantly better than Static at k 3, 4, 5, 6; Tuned" in below
    assert "Free at k 4, 5." in below, "it has points from 3.5 to 5.2 only"
    assert "No row without training is significantly better than GeMoE." in rest
    assert any(s.startswith("Of the accuracy of Tuned (k 8) Ours keeps") for s in rest)


def test_a_rival_wins_and_the_sentence_says_so(bootstrap):
    best, above, below, *rest = sentences(bootstrap, {MAIN: EQUAL | {"gemoe": 0.84}})
    assert best.startswith("The best figures: GeMoE ") and "Ours" not in best
    assert above.startswith("**Significantly better than Ours: GeMoE at k 3 (+")
    assert "Free" not in above and "GeMoE" not in below


def test_a_rival_that_cannot_be_told_from_ours_has_not_lost(bootstrap):
    found = sentences(bootstrap, {MAIN: EQUAL | {"gemoe": 0.80}})
    assert "**No row is significantly better" in found[1]
    assert "No significant difference from Ours: GeMoE at k 3, 4, 5, 6." in found
    assert "GeMoE" not in found[2]


def test_nothing_beats_nothing(bootstrap):
    found = sentences(bootstrap, {MAIN: dict.fromkeys(EQUAL, 0.8)})
    assert "**Ours is significantly better than no other row.**" in found


def test_what_nobody_trained_beats_the_reference(bootstrap):
    found = sentences(bootstrap, {MAIN: EQUAL | {"static": 0.79}})
    assert any(
        s.startswith("**Without any training significantly better than GeMoE: Static at k 3 (+")
        for s in found
    )


def test_another_backbone_agrees_or_does_not(bootstrap):
    same = sentences(bootstrap, {MAIN: EQUAL, SECOND: EQUAL})[-1]
    assert same == (
        "On backbone second 14 of the 14 significant differences to Ours have the same sign; "
        "significantly better than Ours there: no row."
    )
    turned = sentences(bootstrap, {MAIN: EQUAL, SECOND: EQUAL | {"gemoe": 0.85}})[-1]
    assert "10 of the 14" in turned and "**another sign: GeMoE at k 3 (+" in turned
    assert "significantly better than Ours there: GeMoE at k 3" in turned


def test_captions_beside_what_nobody_trained(bootstrap):
    levels = {MAIN: EQUAL, CAPTIONS: {"tuned": 0.6, "score": 0.66, "gemoe": 0.6}}
    said = sentences(bootstrap, levels)[-1]
    assert said.startswith("Trained on captions only, Ours minus the best row without training: -")
    assert "points at k 3 (Static)" in said and "points at k 6 (Static)" in said


def test_without_a_figure_nothing_is_claimed(bootstrap):
    rows = {name: level for name, level in EQUAL.items() if name != "score"}
    assert sentences(bootstrap, {MAIN: rows})[1] == (
        "**Ours has no figure at any mean k from 3 to 6.**"
    )
    some = sentences(bootstrap, {MAIN: EQUAL}, ours="free")
    assert "It has no figure at k 3, 6, so nothing is said about it there." in some[1]
    assert some[1].startswith("**Significantly better than Free: Ours at k 4 (+")
