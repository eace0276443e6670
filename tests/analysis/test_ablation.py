"""The summary of measured pairs, against the plain definition of each number."""

from __future__ import annotations

import numpy as np
import pytest

from gemoe_ds.analysis.ablation import (
    PREDICTORS,
    Pairs,
    as_text,
    read_ablation,
    summary,
    write_ablation,
)
from gemoe_ds.analysis.record import spearman
from gemoe_ds.errors import DataError
from tests.analysis.evaluations import ablation_of, pairs_of


def test_every_number_is_what_its_name_says() -> None:
    pairs = pairs_of()
    found = ablation_of(pairs)
    cost, size = pairs.cost_P, np.abs(pairs.cost_P)
    assert found.mean_cost == pytest.approx(cost.mean())
    assert found.mean_cost_image == pytest.approx(cost[pairs.is_vision_P].mean())
    assert found.mean_cost_per_rank[3] == pytest.approx(cost[pairs.rank_P == 4].mean())
    assert found.mean_size_per_layer[1] == pytest.approx(size[pairs.layer_P == 1].mean())
    named = {one.name: one for one in found.predictors}
    assert list(named) == list(PREDICTORS)
    for name, value in (
        ("score", pairs.score_P),
        ("score_norm", pairs.score_P * pairs.norm_P),
        (
            "score_norm_layer",
            pairs.score_P
            * pairs.norm_P
            / [pairs.norm_P[pairs.layer_P == layer].mean() for layer in pairs.layer_P],
        ),
        ("first_order_size", abs(pairs.first_order_P)),
        ("ratio", pairs.score_P / pairs.best_score_P),
        ("better", -pairs.better_P),
        ("entropy_rank", 1.2 * pairs.entropy_P - pairs.rank_P),
    ):
        one = named[name]
        assert one.spearman == spearman(value, cost) and one.size_spearman == spearman(value, size)
        on = pairs.layer_P == 1
        assert one.size_spearman_per_layer[1] == spearman(value[on], size[on])
        order = np.argsort(value)
        assert one.lower_size == pytest.approx(size[order[:300]].mean())
        assert one.lower_cost == pytest.approx(cost[order[:300]].mean())
        assert one.curve[5] == pytest.approx(size[order[:150]].sum() / size.sum())
        assert one.curve[0] == 0 and one.curve[-1] == pytest.approx(1)
        low, high = one.lower_size_beyond_score[1:]
        assert low <= one.lower_size_beyond_score[0] <= high
    assert named["score_norm"].size_spearman == pytest.approx(1)
    assert named["score_norm"].lower_size_beyond_score[2] < 0  # better than the score, surely


def test_intervals_cover_the_truth_and_shrink_with_the_samples() -> None:
    """The mean of 60 samples lies in the interval of most draws; pairs of a sample go together."""
    truth = pairs_of(200_000, seed=99).cost_P.mean()
    inside = 0
    for seed in range(20):
        low, high = ablation_of(pairs_of(seed=seed)).mean_cost_interval
        inside += low < truth < high
    assert inside >= 16
    few = pairs_of()
    often = Pairs(**{name: np.repeat(array, 5) for name, array in vars(few).items()})
    one, other = (ablation_of(p).mean_cost_interval for p in (few, often))
    assert other == pytest.approx(one)  # five copies of each pair say no more


def test_ties_and_constants_are_said_as_such() -> None:
    pairs = pairs_of(50)
    same = Pairs(**(vars(pairs) | {"entropy_P": np.ones(50), "cost_P": np.zeros(50)}))
    found = ablation_of(same)
    assert {one.spearman for one in found.predictors} == {None}
    assert " - " in as_text(found) and "nan" not in as_text(found)
    one = Pairs(**{name: array[:1] for name, array in vars(pairs).items()})
    assert "1 pairs" in as_text(ablation_of(one)) or "1 pair " in as_text(ablation_of(one))
    with pytest.raises(ValueError, match="no pair"):
        summary(Pairs(**{name: array[:0] for name, array in vars(pairs).items()}), 2)


def test_what_is_written_is_read_beside_its_evaluation_only(tmp_path) -> None:
    made = ablation_of(pairs_of())
    assert read_ablation(tmp_path, made.key) is None
    write_ablation(tmp_path, made, pairs_of())
    assert read_ablation(tmp_path, made.key) == made
    with pytest.raises(DataError, match=r"eval\.json beside it of \('gemoe', None, None, 0\)"):
        read_ablation(tmp_path, ("gemoe", None, None, 0))
    (tmp_path / "ablation.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        read_ablation(tmp_path, made.key)
