"""Figures of a comparison."""

from __future__ import annotations

from experiments.comparison import Curve, compare
from experiments.comparison_figures import training
from tests.experiments.comparisons import row


def test_every_curve_of_the_training_figure_has_a_look_of_its_own():
    """Also where methods are more than colours."""
    names = ["gemoe", "adamoe", "ada_k", "dynmoe", "evomoe", "ltdr", "moepp", "remoe", "top_p"]
    rows = [row("top_k", 8, 0.8)] + [row(name, None, 0.7, 4.0) for name in names]
    drawn = [
        Curve(method=name, k=None, seed=0, step_S=(1, 2), loss_S=(2, 1), mean_k_S=(5, 4))
        for name in names
    ]
    figure = training(compare(rows, drawn, command="", seconds=0))
    lines = figure.axes[0].get_lines()
    looks = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines}
    assert len(lines) == len(looks) == len(names)
