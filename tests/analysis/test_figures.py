"""The figures show the numbers of the results, and come out as pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from PIL import Image

from gemoe_ds.analysis import drawing, expert_figures, figures
from gemoe_ds.analysis.ablation import PREDICTORS
from gemoe_ds.analysis.record import TokenSample
from gemoe_ds.analysis.results import Results, build_results
from tests.analysis.evaluations import ablation_of, demo_evaluations, evaluation, gains, pairs_of

Draw = Callable[[str], Figure]


@pytest.fixture(scope="module")
def demo() -> tuple[Results, figures.Tokens]:
    made = demo_evaluations()
    results = build_results([record for record, _ in made], command="")
    measured = ablation_of(pairs_of()), ablation_of(pairs_of(seed=1), method="gemoe", k=None)
    results = results.model_copy(update={"ablations": measured, "gains": gains()})
    return results, {record.key: TokenSample.of(sums) for record, sums in made}


@pytest.fixture
def draw(demo: tuple[Results, figures.Tokens]) -> Draw:
    def drawn(name: str) -> Figure:
        made = figures.FIGURES[name][1](*demo)
        assert made is not None
        made.canvas.draw()
        return made

    return drawn


def line(axes: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    (found,) = [drawn for drawn in axes.lines if drawn.get_label() == label]
    return found.get_xdata(), found.get_ydata()


def bar_groups(axes: Axes) -> list[BarContainer]:
    return [group for group in axes.containers if isinstance(group, BarContainer)]


def test_every_figure_is_written_as_a_readable_picture(
    demo: tuple[Results, figures.Tokens], tmp_path: Path
) -> None:
    written = figures.write_figures(*demo, tmp_path / "figures")
    assert [entry.file for entry in written] == [f"{name}.png" for name in figures.FIGURES]
    for entry in written:
        with Image.open(tmp_path / "figures" / entry.file) as image:
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            pixels = np.asarray(image.convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # not an empty canvas
        assert (pixels[[0, -1]] == 255).all()  # nothing is cut off above or below
        assert (pixels[:, [0, -1]] == 255).all()
        assert entry.caption.endswith(".")


def test_accuracy_against_k_has_the_static_curve_the_tuned_points_and_gemoe(
    demo: tuple[Results, figures.Tokens], draw: Draw
) -> None:
    (axes,) = draw("accuracy_against_k").axes
    rows = {row.key: row for row in demo[0].rows}
    k, accuracy = line(axes, "Top-k")
    assert list(k) == [8, 7, 6, 5, 4, 3, 2]
    assert list(accuracy) == pytest.approx([100 * rows["top_k", i, None, 0].accuracy for i in k])
    k, accuracy = line(axes, "Top-k, tuned")
    assert list(k) == [8, 5]
    assert list(accuracy) == pytest.approx(
        [100 * rows["top_k_tuned", i, None, 0].accuracy for i in k]
    )
    k, accuracy = line(axes, "GeMoE")
    seeds = [rows["gemoe", None, None, seed] for seed in range(3)]
    assert k == pytest.approx([np.mean([row.mean_k for row in seeds])])
    assert accuracy == pytest.approx([100 * np.mean([row.accuracy for row in seeds])])


def test_bars_are_the_change_of_each_kind_against_the_baseline(
    demo: tuple[Results, figures.Tokens], draw: Draw
) -> None:
    (axes,) = draw("accuracy_by_kind").axes
    bars = {c.get_label(): [bar.get_height() for bar in c] for c in bar_groups(axes)}
    assert list(bars) == ["Top-5", "Top-8, tuned", "Top-5, tuned", "GeMoE"]  # k = 5 is nearest
    results = demo[0]
    base = results.baseline.rows[0].accuracy_by_kind
    for index, kind in enumerate(results.kinds):
        mean = np.mean([row.accuracy_by_kind[kind] for row in results.adaptive[0].rows])
        assert bars["GeMoE"][index] == pytest.approx(100 * (mean - base[kind]))
    ticks = [text.get_text() for text in axes.get_xticklabels()]
    assert ticks == [f"{kind}\n{100 * base[kind]:.1f} %" for kind in results.kinds]


def test_mean_k_has_one_point_a_layer(demo: tuple[Results, figures.Tokens], draw: Draw) -> None:
    (axes,) = draw("mean_k_per_layer").axes
    layers, mean = line(axes, "GeMoE")
    assert list(layers) == [1, 2, 3, 4]
    rows = demo[0].adaptive[0].rows
    assert mean == pytest.approx(np.mean([row.mean_k_per_layer for row in rows], axis=0))
    names = {text.get_text() for text in axes.texts}
    assert {"Top-8 (also tuned)", "Top-5 (also tuned)", "Top-2"} <= names


def test_entropy_panels_show_mean_k_of_equal_entropy_and_the_recorded_spearman(
    demo: tuple[Results, figures.Tokens], draw: Draw
) -> None:
    panels = draw("entropy_against_k").axes
    row = demo[0].adaptive[0].rows[0]
    sample = demo[1][row.key]
    assert [axes.get_title(loc="left") or axes.get_title() for axes in panels] == [
        f"Layer {layer}" for layer in range(1, 5)
    ]
    for layer, axes in enumerate(panels):
        (curve,) = axes.lines
        entropy, k = np.asarray(curve.get_xdata()), np.asarray(curve.get_ydata())
        middle = len(entropy) // 2
        half = (entropy[middle + 1] - entropy[middle]) / 2
        near_N = np.abs(sample.entropy_LN[layer] - entropy[middle]) < half
        assert k[middle] == pytest.approx(sample.k_LN[layer][near_N].mean(), abs=0.02)
        assert k[-1] > k[0] + 4
        (text,) = axes.texts
        assert text.get_text() == f"Spearman {row.spearman_per_layer[layer]:.3f}"


def test_histograms_are_shares_of_each_modality(
    demo: tuple[Results, figures.Tokens], draw: Draw
) -> None:
    panels = draw("k_histogram").axes
    sample = demo[1]["gemoe", None, None, 0]
    for layer, axes in enumerate(panels):
        shares = {c.get_label(): [bar.get_height() for bar in c] for c in bar_groups(axes)}
        for name, histogram_LK in (
            ("image tokens", sample.k_hist_vision_LK),
            ("text tokens", sample.k_hist_text_LK),
        ):
            assert sum(shares[name]) == pytest.approx(100)
            share_K = 100 * histogram_LK[layer] / histogram_LK[layer].sum()
            assert shares[name] == pytest.approx(share_K.tolist())


def test_curves_of_dropped_experts_are_those_of_the_ablation(
    demo: tuple[Results, figures.Tokens], draw: Draw
) -> None:
    panels = draw("dropped_expert_cost").axes
    assert [axes.get_title() for axes in panels] == ["Top-8", "GeMoE"]
    for axes, found in zip(panels, demo[0].ablations, strict=True):
        curves = {one.name: one.curve for one in found.predictors}
        for name in expert_figures.SHOWN:
            share, size = line(axes, PREDICTORS[name][0])
            assert list(share[[0, 10, 20]]) == [0, 50, 100]
            assert size == pytest.approx(100 * np.array(curves[name]))


def test_gains_are_drawn_bin_by_bin(demo: tuple[Results, figures.Tokens], draw: Draw) -> None:
    by_entropy, by_mass = draw("gain_of_more_experts").axes
    assert by_entropy.get_xlabel() == "mean gating entropy of the sample (bits)"
    assert by_mass.get_xlabel() == "mean score mass of the best 8 experts of the sample"
    for axes, by in ((by_entropy, "entropy"), (by_mass, "mass")):
        for gain in demo[0].gains:
            if gain.by == by:
                value, height = line(axes, f"{gain.fewer} to 8 experts")
                assert list(value) == [b.value for b in gain.bins]
                assert list(height) == [b.gain for b in gain.bins]


def test_token_kinds_have_a_panel_each_and_answers_one(
    demo: tuple[Results, figures.Tokens], draw: Draw
) -> None:
    image, answer, along = draw("mean_k_by_token_kind").axes
    rows = demo[0].adaptive[0].rows
    for axes, kind in ((image, "image"), (answer, "answer")):
        assert axes.get_title() == kind
        layers, mean = line(axes, "GeMoE")
        assert list(layers) == [1, 2, 3, 4]
        assert mean == pytest.approx(np.mean([row.mean_k_by_token_kind[kind] for row in rows], 0))
    assert list(line(along, "GeMoE")[1]) == [4.0, 5.0, 5.5, 6.0]


def test_a_method_has_one_colour_in_every_figure(draw: Draw) -> None:
    (scatter,) = draw("accuracy_against_k").axes
    (layers,) = draw("mean_k_per_layer").axes
    (bars,) = draw("accuracy_by_kind").axes
    curves = [curve for axes in (scatter, layers) for curve in axes.lines]
    found = {to_hex(curve.get_color()) for curve in curves if curve.get_label() == "GeMoE"}
    found |= {to_hex(c[0].get_facecolor()) for c in bar_groups(bars) if c.get_label() == "GeMoE"}
    found |= {to_hex(a.lines[0].get_color()) for a in draw("entropy_against_k").axes}
    assert found == {drawing.COLOURS["gemoe"].lower()}
    palette = [*drawing.COLOURS.values(), *drawing.OTHERS]
    assert len(set(palette)) == len(palette)


def test_figures_with_nothing_to_show_are_left_out(tmp_path: Path) -> None:
    record, sums = evaluation("top_k", 8, 0)
    results = build_results([record], command="")
    written = figures.write_figures(results, {record.key: TokenSample.of(sums)}, tmp_path)
    assert [entry.file for entry in written] == ["accuracy_against_k.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["accuracy_against_k.png"]


def test_two_adaptive_methods_have_their_own_panels_and_colours() -> None:
    made = [evaluation("top_k", 8, 0), evaluation("gemoe", None, 1), evaluation("zeta", None, 2)]
    results = build_results([record for record, _ in made], command="")
    samples = {record.key: TokenSample.of(sums) for record, sums in made}
    drawn = figures.FIGURES["entropy_against_k"][1](results, samples)
    assert drawn is not None
    assert len(drawn.axes) == 8
    colours = [to_hex(axes.lines[0].get_color()) for axes in drawn.axes]
    assert colours == 4 * [drawing.COLOURS["gemoe"].lower()] + 4 * [drawing.OTHERS[0].lower()]


def test_bins_with_few_tokens_are_left_out() -> None:
    x_N = np.array([0.5] * 10 + [1.5] * 3 + [3.0] * 12)
    y_N = np.array([2.0] * 5 + [4.0] * 5 + [1.0] * 3 + [7.0] * 12)
    middle, mean = figures.binned_mean(x_N, y_N, np.array([0.0, 1.0, 2.0, 3.0]))
    assert middle.tolist() == [0.5, 2.5]  # the last bin holds its right edge
    assert mean.tolist() == [3.0, 7.0]
